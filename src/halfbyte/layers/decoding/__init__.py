"""Single tokens at the speed of memory: a model's layers as one list of operations for a compiled interpreter."""
