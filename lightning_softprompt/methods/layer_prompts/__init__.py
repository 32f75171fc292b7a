"""Methods with keys, values or soft tokens inside the layers."""
