"""The optimizer of a pipeline: copies of a tied parameter must be stepped equally."""

from __future__ import annotations

from itertools import chain

from torch import nn
from torch.optim import Optimizer

from faccel.backends.fsdp import same_optimizer
from faccel.backends.pipeline_engine import PipelineEngine, TiedParam
from faccel.comm.objects import gather_json
from faccel.context import DistContext
from faccel.errors import OptimizerError

Options = dict[str, str]


def wrap_optimizer(opt: Optimizer, engine: nn.Module, ctx: DistContext) -> Optimizer:
    """Return `opt`, if it steps the copies of each tied parameter equally. Collective.

    Raises:
        OptimizerError: The copies are in groups with other options, only some of them are in a
            group, or `opt` rounds stochastically. Or `opt` does not step shards.
    """
    assert isinstance(engine, PipelineEngine)
    opt = same_optimizer(opt, engine, ctx)
    # Equal on all ranks, also on one whose stages have no tied parameter.
    if not engine.has_tied:
        return opt
    records = [(tied.names[0], tied.name, _options_of(opt, tied, engine)) for tied in engine.tied]
    seen: dict[str, tuple[str, Options | None]] = {}
    # In the order of the ranks, so that all of them raise for the same pair.
    for key, name, options in chain.from_iterable(gather_json(records, ctx, axis="pp")):
        first_name, first_options = seen.setdefault(key, (name, options))
        if options != first_options:
            raise _other_options(first_name, first_options, name, options)
        if options is not None and getattr(opt, "bf16_stochastic_round", False):
            raise OptimizerError(
                "stochastic rounding draws other random numbers for each copy of a tied parameter, "
                "so the stages would train apart",
                got=f"a {type(opt).__name__} with bf16_stochastic_round=True, and `{key}`",
                fix='leave it out and use `mixed_precision="bf16"`, or do not tie the parameter',
            )
    return opt


def _options_of(opt: Optimizer, tied: TiedParam, engine: PipelineEngine) -> Options | None:
    """Return the options of the group of a parameter as text; None if nothing steps it."""
    tied_param = engine.parameter(tied.name)
    if not tied_param.requires_grad:
        return None
    for group in opt.param_groups:
        if any(param is tied_param for param in group["params"]):
            return {name: str(group[name]) for name in group if not name.startswith("param")}
    return None


def _other_options(
    first_name: str, first: Options | None, name: str, other: Options | None
) -> OptimizerError:
    got = "only one of them in a group"
    if first is not None and other is not None:
        differing = sorted(key for key in first | other if first.get(key) != other.get(key))
        key = differing[0]
        got = f"{key}={first.get(key)} and {key}={other.get(key)}"
    return OptimizerError(
        f"`{first_name}` and `{name}` are copies of one tied parameter, and their groups differ, "
        "so the stages would train apart",
        got=got,
        fix=f"put `{name}` into the group of `{first_name}`, which is the only name on one process",
    )
