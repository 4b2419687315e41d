"""The base store: a model quantised once, kept on disk as a standard pre-quantised checkpoint, opened memory-mapped."""
