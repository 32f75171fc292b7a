"""Initializers, networks and other building blocks of methods."""
