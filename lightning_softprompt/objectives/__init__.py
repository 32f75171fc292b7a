"""Training objectives: losses on logits, scores and targets, independent of model family and method."""
