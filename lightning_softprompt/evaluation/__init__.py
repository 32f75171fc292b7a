"""How answers are scored: metrics of a prompted language model on batches, exact whatever the batches and processes."""
