"""Frozen language models: one file for each family of architectures, which implements `Codec` and `Backbone`."""
