"""The questions of `faccel config` on a terminal, each with an explanation and a default."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import click

from faccel.checks import parse_count
from faccel.config import PRECISIONS, Config, config_fields
from faccel.config_file import NPROC
from faccel.config_mesh import check_num_processes, fixed_mesh_size
from faccel.errors import ConfigError

# Fields without an entry here are not asked for: few users change them.
_EXPLANATIONS: Mapping[str, str] = {
    "mixed_precision": (
        "bf16 roughly halves time and memory on devices that support it; parameters stay fp32. "
        "fp16 is for older GPUs and scales the loss. fp8 is for large layers on GPUs from 2022 on. "
        "no computes in fp32. bf16-true and fp16-true also store parameters in 16 bits."
    ),
    "grad_accum": "Micro-batches per optimizer update: a larger batch than fits into memory.",
    "seed": "The same seed gives the same data order and a reproducible run.",
    "device": "Leave empty to use the best available device when the script starts.",
    "mesh": (
        "Ranks per axis of parallelism, as in dp_shard=4,tp=2. An axis of -1 fills the world: "
        "dp_shard=-1 fits any number of processes. "
        "Leave empty to replicate the model on each rank (DDP)."
    ),
    "run_dir": "Folder in which trackers create their folders.",
    "timeout_s": "Seconds after which a rank that waits for another rank raises an error.",
}


def ask(
    current: Mapping[str, Any], recommended: Mapping[str, Any], num_processes: int
) -> dict[str, Any]:
    """Ask for each field, and for the number of processes per node.

    Effects: ambient. Reads the terminal.

    Args:
        current: Values in the file. Fields that are not asked for keep their values.
        recommended: Defaults for this node.
        num_processes: Default number of processes.

    Returns:
        The values that differ from the defaults of `Config`, and `nproc`, the processes per node.

    Raises:
        KeyboardInterrupt: The user pressed Ctrl-C.
    """
    import questionary

    values = dict(current)
    for field in config_fields():
        if field.name not in _EXPLANATIONS:
            continue
        # The order of proposals: the file, what suits this node, the default.
        proposal = current.get(field.name, recommended.get(field.name, field.default))
        click.echo(f"\n{_EXPLANATIONS[field.name]}")
        if field.name == "mixed_precision":
            # A list of all values; the other fields are free text.
            answer = questionary.select(
                field.name, choices=list(PRECISIONS), default=str(proposal)
            ).unsafe_ask()
        else:
            answer = _ask_text(field.name, proposal, field.metadata["parse"], field.default)
        # A file that repeats defaults would freeze them for later versions.
        values.pop(field.name, None)
        if answer != field.default:
            values[field.name] = answer
    click.echo("\nUse one process per GPU. On a CPU, 2 processes show how a parallel run behaves.")
    values[NPROC] = _ask_num_processes(values.get("mesh"), current.get(NPROC), num_processes)
    return values


def _ask_num_processes(mesh: Any, current: object, num_processes: int) -> int:
    """Return the processes per node: a number that the mesh fits."""
    import questionary

    config = Config(mesh=mesh)
    # The order of proposals: the file, the size of the mesh, one per GPU.
    proposal = current
    if not isinstance(current, int):
        proposal = fixed_mesh_size(config) or num_processes

    def validate(text: str) -> bool | str:
        count = parse_count(text)
        if not count:
            return "expected a number of processes: 1, 2, ..."
        try:
            check_num_processes(config, count)
        except ConfigError as error:
            return str(error).replace("\n", " ")
        return True

    answer = questionary.text("processes per node", default=str(proposal), validate=validate)
    return int(answer.unsafe_ask())


def _ask_text(name: str, proposal: object, parse: Callable[[str], Any], default: object) -> Any:
    """Return the parsed answer; an empty answer is the default."""
    import questionary

    text = ""
    if proposal is not None:
        text = str(proposal)
    answer = questionary.text(name, default=text, validate=_validator(name, parse)).unsafe_ask()
    if not answer.strip():
        return default
    return parse(answer.strip())


def _validator(name: str, parse: Callable[[str], Any]) -> Callable[[str], bool | str]:
    """Return a validator for questionary: True, or the message to print below the prompt."""

    def validate(text: str) -> bool | str:
        if not text.strip():
            return True
        try:
            Config(**{name: parse(text.strip())})
        except ConfigError as error:
            return str(error).replace("\n", " ")  # the prompt has one line for a message
        except ValueError as error:
            return str(error)
        return True

    return validate
