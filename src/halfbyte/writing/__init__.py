"""Texts written token by token: the only room that samples, and that runs a tape to write."""
