"""Metrics and the intervals of their means."""
