"""Objectives that learn from answers which the trained prompt generates."""
