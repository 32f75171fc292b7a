"""Language modeling on documents: reading, windows, streaming and corruption."""
