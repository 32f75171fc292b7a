"""Parts that methods share, in plain torch."""
