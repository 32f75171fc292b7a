"""Evaluation of prompts that were trained with a reward."""
