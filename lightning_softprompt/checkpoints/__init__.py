"""Prompt-only checkpoints: what a run leaves, kilobytes in size, bound to its backbone."""
