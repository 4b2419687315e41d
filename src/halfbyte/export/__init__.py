"""A run put into other programs' hands: merged, as GGUF, as an adapter for them; proven, described, pushed."""
