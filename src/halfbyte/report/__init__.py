"""What a run's folder says, as a page: curves, data, scores, what changed; and runs side by side."""
