"""Changes of training rows that are drawn again in each epoch. Validation and test rows are never changed."""
