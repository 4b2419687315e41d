"""Answers that a run writes itself, to learn from their rewards."""
