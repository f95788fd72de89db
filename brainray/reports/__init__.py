"""HTML reports, and the model card."""
