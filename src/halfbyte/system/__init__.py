"""This machine and this process: what there is, what is used, and how files are made durable. No torch, no model."""
