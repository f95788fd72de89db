"""From images to predictions: engines, the prediction table, and the bulk job."""
