"""Question answering with retrieved passages: data modules and what they are made of."""
