"""Extends a tokenizer with terms of a corpus: counts words, selects new tokens, writes and measures the tokenizer."""
