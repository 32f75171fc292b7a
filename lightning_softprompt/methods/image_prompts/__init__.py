"""Prompts of backbones that compare images with texts."""
