"""Ray Train jobs: train, cross-validate, export."""
