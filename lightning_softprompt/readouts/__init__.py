"""How class scores are read off a language model: loss and metric ask the same readout, so they cannot disagree."""
