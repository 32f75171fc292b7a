"""What a trained prompt consists of, and its effect on attention and answers."""
