"""Prompt-only checkpoints and prompt files, bound to their backbone."""
