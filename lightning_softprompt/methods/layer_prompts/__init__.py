"""Keys, values and states inside the layers."""
