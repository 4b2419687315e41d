"""Mixture of experts: which modules hold experts, their fast forward, and the same by definition."""
