"""The parser of run commands, and explanations of its errors."""
