"""How a frozen language model generates answers."""
