"""Passes over memory that torch does not have, a folder for each kind of device."""

ALL_TOKENS = 1 << 40  # before or behind a token: more than any text has
CAUSAL = ALL_TOKENS, 0  # how many tokens before and after itself a token sees
