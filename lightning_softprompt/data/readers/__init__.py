"""Readers of rows: one module for each form that rows are written in."""
