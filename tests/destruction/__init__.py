"""Runs tried to destruction: killed at any moment, their files damaged, their disk full, strangers' files read."""
