"""Metrics of answers that are compared, ranked or liked."""
