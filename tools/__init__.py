"""Programs for those who work on halfbyte; no part of the package."""
