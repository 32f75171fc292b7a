"""What retrieval-augmented answers are searched with: a corpus cut into passages, and an index of them on disk."""
