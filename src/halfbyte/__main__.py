"""`python -m halfbyte`."""

from halfbyte.cli import main

main()
