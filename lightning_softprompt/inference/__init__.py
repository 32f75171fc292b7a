"""Trained prompts in Python: prediction and generation."""
