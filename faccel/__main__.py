"""`python -m faccel`."""

from faccel.cli import main

main(prog_name="faccel")
