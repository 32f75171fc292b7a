"""Rewards of generated answers, one in each file."""
