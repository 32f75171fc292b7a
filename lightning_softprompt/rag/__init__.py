"""Question answering with retrieved passages: data modules and their components."""
