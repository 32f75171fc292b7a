"""Runs of training: sessions, replicas and estimates of memory."""
