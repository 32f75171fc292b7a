"""Rows of instructions and dialogues."""
