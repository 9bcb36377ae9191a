"""`python -m heldout` is `heldout`."""

from heldout.cli import main

main()
