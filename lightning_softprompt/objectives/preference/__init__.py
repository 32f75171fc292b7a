"""Objectives that learn from preferences directly, one in each file."""
