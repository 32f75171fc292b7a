"""Callbacks that write metrics, predictions and plots."""
