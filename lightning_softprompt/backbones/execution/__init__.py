"""How a batch of rows runs through a decoder: packed, padded or row by row, all to the same logits."""
