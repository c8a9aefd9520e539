"""`python -m apet`: runs the command without its entry point."""

from apet.cli import main

main()
