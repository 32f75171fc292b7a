"""Rows of requests as batches of the backbone, in a thread of their own."""
