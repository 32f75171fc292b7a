"""Ways to search passages: by words, by vectors, and by both."""
