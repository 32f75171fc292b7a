"""Callbacks that let a run survive interruptions, memory limits and invalid numbers."""
