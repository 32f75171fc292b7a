"""The values that every part of the package shares."""
