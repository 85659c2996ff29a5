"""`python -m surgery.cli`."""

from surgery.cli import main

main()
