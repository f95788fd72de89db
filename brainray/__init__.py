"""Distributed classification of brain-tumour MRI slices on Ray."""

__version__ = "0.1.0"
