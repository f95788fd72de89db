"""The network and the sealed classifier folder."""
