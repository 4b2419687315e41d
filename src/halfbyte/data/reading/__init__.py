"""Files -> rows: every format, every bad row with its file and line. No torch."""
