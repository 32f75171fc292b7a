"""Commands that write trained models for other software."""
