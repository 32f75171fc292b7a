"""Methods that use trained prompts from files."""
