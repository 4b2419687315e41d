"""Rows -> tokens and labels: chat templates, masks, the cache of tokens. No torch."""
