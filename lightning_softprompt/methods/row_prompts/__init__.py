"""Methods whose soft tokens depend on the input."""
