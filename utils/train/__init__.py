"""Training: what a run is made of, and the loop that drives it."""
