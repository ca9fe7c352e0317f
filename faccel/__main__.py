"""Entry point of the command `faccel`, and of `python -m faccel`."""

from faccel.launching.command_end import CommandEnd, open_standard_streams


def main() -> None:
    """Run the command line. A signal ends it with one line, also while it is imported."""
    open_standard_streams()
    CommandEnd().install()
    from faccel.cli.commands import main as run_command

    run_command(prog_name="faccel")


if __name__ == "__main__":
    main()
