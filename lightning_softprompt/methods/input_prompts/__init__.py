"""Methods with the same soft tokens in the input of every row."""
