"""Scores of the difficulty of training rows, for curricula."""
