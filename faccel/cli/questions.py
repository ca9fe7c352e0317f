"""The questions of `faccel config` on a terminal, each with an explanation and a default."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click

from faccel.checks import parse_count
from faccel.config import PRECISIONS, STRATEGIES, Config, config_fields
from faccel.config_file import NPROC
from faccel.config_mesh import check_num_processes, fixed_mesh_size
from faccel.errors import ConfigError

# In the order of the questions. Fields without an entry are not asked for: few users change them.
_EXPLANATIONS: Mapping[str, str] = {
    "mixed_precision": (
        "bf16 roughly halves time and memory on devices that support it; parameters stay fp32. "
        "fp16 is for older GPUs and scales the loss. fp8 is for large layers on GPUs from 2022 on. "
        "no computes in fp32. bf16-true and fp16-true also store parameters in 16 bits."
    ),
    "grad_accum": "Micro-batches per optimizer update: a larger batch than fits into memory.",
    "seed": "The same seed gives the same data order and a reproducible run.",
    "device": "Leave empty to use the best available device when the script starts.",
    "strategy": (
        "Leave it at none for PyTorch's strategies, which the mesh chooses: DDP, FSDP2, tensor "
        "and pipeline parallel. deepspeed runs DeepSpeed's ZeRO, megatron models of Megatron-core."
    ),
    "zero": (
        "Stage of ZeRO: 1 shards optimizer states over the ranks, 2 gradients too, 3 parameters "
        "too."
    ),
    "mesh": (
        "Ranks per axis of parallelism, as in dp_shard=4,tp=2. An axis of -1 fills the world: "
        "dp_shard=-1 fits any number of processes. "
        "Leave empty to replicate the model on each rank (DDP)."
    ),
    "units": (
        "The class of the layers of a model, such as LlamaDecoderLayer: FSDP2 gathers the "
        "parameters of one layer at a time. Leave empty for the model's own choice."
    ),
    "run_dir": "Folder in which trackers create their folders.",
    "timeout_s": "Seconds after which a rank that waits for another rank raises an error.",
}


def ask(
    current: Mapping[str, Any], recommended: Mapping[str, Any], num_processes: int
) -> tuple[dict[str, Any], int]:
    """Ask for each field, for the number of processes per node, and for the number of nodes.

    Effects: ambient. Reads the terminal.

    Args:
        current: Values in the file. Fields that are not asked for keep their values.
        recommended: Defaults for this node.
        num_processes: Default number of processes.

    Returns:
        The values that differ from the defaults of `Config`, with `nproc`, the processes per node;
        and the number of nodes, which no file has.

    Raises:
        KeyboardInterrupt: The user pressed Ctrl-C.
    """
    values = dict(current)
    fields = {field.name: field for field in config_fields()}
    for name, explanation in _EXPLANATIONS.items():
        if not _applies(name, values):
            values.pop(name, None)
            continue
        click.echo(f"\n{explanation}")
        if name == "units":
            _ask_units(values)
            continue
        # The order of proposals: the file, what suits this node, the default.
        default = fields[name].default
        proposal = current.get(name, recommended.get(name, default))
        if name in _CHOICES:
            answer = _select(name, _CHOICES[name], proposal)
        else:
            answer = _ask_text(name, proposal, fields[name].metadata["parse"], default)
        # A file that repeats defaults would freeze them for later versions.
        values.pop(name, None)
        if answer != default:
            values[name] = answer
    click.echo("\nUse one process per GPU. On a CPU, 2 processes show how a parallel run behaves.")
    values[NPROC] = _ask_num_processes(values.get("mesh"), current.get(NPROC), num_processes)
    click.echo("\nNodes that train together, with as many processes each.")
    return values, _ask_num_nodes()


# The fields with few values, as lists; the others are free text.
_CHOICES: Mapping[str, Sequence[str]] = {
    "mixed_precision": PRECISIONS,
    "strategy": ("none", *STRATEGIES),
}


def _applies(name: str, values: Mapping[str, Any]) -> bool:
    """Return whether the answers so far leave a question open."""
    if name == "zero":
        return values.get("strategy") is not None
    # DeepSpeed has one axis, over which it shards.
    if name == "mesh":
        return values.get("strategy") != "deepspeed"
    if name == "units":
        return "dp_shard" in str(values.get("mesh"))
    return True


def _select(name: str, choices: Sequence[str], proposal: object) -> str | None:
    import questionary

    default = str(proposal or choices[0])
    answer = questionary.select(name, choices=list(choices), default=default).unsafe_ask()
    if answer == "none":  # a list has no empty entry
        return None
    return answer


def _ask_units(values: dict[str, Any]) -> None:
    """Ask for the units of the plan, whose other fields stay."""
    import questionary

    from faccel.plan_values import plan_values, to_plan

    plan = plan_values(to_plan(values.get("plan") or {}))
    proposal = plan.pop("units", "")
    answer = questionary.text("units", default=str(proposal)).unsafe_ask().strip()
    if answer == str(proposal):
        answer = proposal  # several names, or a number of parameters, stay as they are
    if answer:
        plan["units"] = answer
    values.pop("plan", None)
    if plan:
        values["plan"] = plan


def _ask_num_nodes() -> int:
    import questionary

    def validate(text: str) -> bool | str:
        return bool(parse_count(text)) or "expected a number of nodes: 1, 2, ..."

    return int(questionary.text("nodes", default="1", validate=validate).unsafe_ask())


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
