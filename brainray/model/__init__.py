"""The network and the classifier bundle."""
