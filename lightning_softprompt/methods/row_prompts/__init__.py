"""Soft tokens that depend on the row."""
