"""The detector: layers, models, weights."""
