"""Run folders, run records and loggers."""
