"""Passes over memory that torch does not have, a folder for each kind of device."""
