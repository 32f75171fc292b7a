"""Soft tokens in the input, the same for every row."""
