"""A finished run used: generate, chat, evaluate."""
