"""Commands that analyze prompts and runs."""
