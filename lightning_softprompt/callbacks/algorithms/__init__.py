"""Callbacks that are part of a training algorithm."""
