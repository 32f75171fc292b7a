"""The rows of the splits of a data module: read, held out, encoded and loaded."""
