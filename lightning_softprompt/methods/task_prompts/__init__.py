"""Prompts of several tasks that share parameters."""
