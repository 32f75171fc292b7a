"""Filters: each selects among rows and gives the reason for every row that it drops."""
