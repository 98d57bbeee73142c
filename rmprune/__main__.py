"""`python -m rmprune`."""

from rmprune.cli import main

main()
