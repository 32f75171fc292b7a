"""Curricula: which rows a training uses at which step, and how often."""
