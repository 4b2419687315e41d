"""Runs behind OpenAI's HTTP interface: one base, several adapters and the base alone, all texts in one batch."""
