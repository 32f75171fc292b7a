"""Synthetic data: rows that the frozen model writes, and filters that select among them."""
