"""A run that watches itself: gradients, losses, and whether it still computes what was proven at its start."""
