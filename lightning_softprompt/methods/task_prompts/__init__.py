"""Methods whose prompts share parameters between tasks."""
