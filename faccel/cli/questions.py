"""The questions of `faccel config`, in a terminal: each explained, each with what suits this machine as its answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import click

from faccel.config import PRECISIONS, Config, config_fields
from faccel.errors import ConfigError

_WHY: Mapping[str, str] = {
    "mixed_precision": "bf16 halves time and memory where the device has it, parameters stay fp32; fp16 is for older "
    "GPUs and scales the loss; no computes in fp32.",
    "grad_accum": "Gradients of this many micro-batches make one update: a larger batch than memory holds.",
    "seed": "The same seed gives the same order of the data, and the same run again.",
    "device": "Empty takes the best that is there when the script starts.",
    "mesh": "Which parallelism takes how many ranks, as in dp_shard=4,tp=2. Empty: each rank has a whole model (DDP).",
    "run_dir": "Where trackers put their folders.",
    "timeout_s": "After this many seconds a rank that waits in vain for another ends with an error.",
}


def ask(present: Mapping[str, Any], suited: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """Ask for the fields, and for the number of processes of a machine, which a file does not hold.

    Effects: ambient. Reads the terminal.

    Args:
        present: What the file says now; fields that are not asked for stay as they are.
        suited: What suits this machine, and `nproc`.

    Returns:
        The values that are not the defaults, and the number of processes.

    Raises:
        KeyboardInterrupt: Ctrl-C; nothing was written.
    """
    import questionary

    values = dict(present)
    for field in config_fields():
        if field.name not in _WHY:
            continue
        proposal = present.get(field.name, suited.get(field.name, field.default))
        click.echo(f"\n{_WHY[field.name]}")
        if field.name == "mixed_precision":
            answer: Any = questionary.select(
                field.name, choices=list(PRECISIONS), default=str(proposal)
            ).unsafe_ask()
        else:
            text = "" if proposal is None else str(proposal)
            check = _checker(field.name, field.metadata["parse"])
            answer = questionary.text(field.name, default=text, validate=check).unsafe_ask().strip()
            answer = field.metadata["parse"](answer) if answer else field.default
        values.pop(field.name, None)
        if answer != field.default:
            values[field.name] = answer
    click.echo("\nOne process per GPU is usual; on a CPU, 2 show what changes with several.")
    count = questionary.text(
        "processes on this machine", default=str(suited["nproc"]), validate=_is_count
    ).unsafe_ask()
    return values, int(count)


def _checker(name: str, parse: Callable[[str], Any]) -> Callable[[str], bool | str]:
    def check(text: str) -> bool | str:
        if not text.strip():
            return True
        try:
            Config(**{name: parse(text.strip())})
        except ConfigError as error:
            return str(error).replace("\n", " ")
        except ValueError as error:
            return str(error)
        return True

    return check


def _is_count(text: str) -> bool | str:
    return (text.isdecimal() and int(text) > 0) or "a number of processes: 1, 2, ..."
