"""Encoded bytes to pixels, and pixels to network input."""
