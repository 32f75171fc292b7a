"""Runs that belong together, and what their files say."""
