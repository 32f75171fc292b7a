"""Data with images."""
