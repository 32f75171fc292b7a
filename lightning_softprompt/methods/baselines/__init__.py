"""Baselines: no prompt, LoRA and full fine-tuning."""
