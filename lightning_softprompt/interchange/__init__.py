"""Conversion of prompts from and to the formats of other software."""
