"""Frozen language models: one family of architectures a file, behind the contracts `Codec` and `Backbone`."""
