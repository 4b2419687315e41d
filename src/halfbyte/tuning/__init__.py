"""Settings that short runs choose in a given time, and what fits into it."""
