"""Files of an output: locks, conditional writes, keyed identifiers."""
