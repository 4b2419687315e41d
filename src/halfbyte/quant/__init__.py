"""Number formats of frozen weights, and the only door to bitsandbytes."""
