"""What a run says, what another program says of an export of it, and whether rounding explains the difference."""
