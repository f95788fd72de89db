"""The jobs: train, evaluate, and the demonstration."""
