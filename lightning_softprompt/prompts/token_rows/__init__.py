"""Initializers of the rows of new tokens, one file per kind; each is an object of a class of `TokenRowsInit`."""
