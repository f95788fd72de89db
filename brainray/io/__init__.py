"""Below an output: who may write there."""
