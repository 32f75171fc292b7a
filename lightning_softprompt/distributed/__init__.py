"""One backbone in several processes."""
