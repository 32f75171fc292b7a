"""Documents and the passages that they are split into."""
