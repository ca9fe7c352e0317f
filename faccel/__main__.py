"""Entry point of `python -m faccel`."""

from faccel.cli.commands import main

main(prog_name="faccel")
