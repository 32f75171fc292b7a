"""Verifiable constraints: properties of an answer that a program can check."""
