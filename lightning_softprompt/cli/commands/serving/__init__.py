"""Commands that answer with trained prompts."""
