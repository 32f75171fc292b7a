"""The order in which training draws rows."""
