"""Fast operations for frozen weights."""
