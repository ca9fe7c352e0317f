"""`place`: loads a model from safetensors files onto devices, within a budget of memory."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import nn

from faccel.checkpoint.arguments import path_argument
from faccel.checkpoint.rank_calls import on_all_ranks
from faccel.checks import instance_of
from faccel.context import DistContext, require_context
from faccel.effects import AMBIENT, COLLECTIVE, effectful, updates
from faccel.errors import ConfigError, ModelError, short_repr
from faccel.inference.free_memory import default_budget
from faccel.inference.loading import (
    Loader,
    check_buffers,
    check_not_compiled,
    check_placeable,
    tensors_of,
)
from faccel.inference.placed_model import PlacedModel
from faccel.inference.placement import Placement
from faccel.inference.placement_units import plan_argument
from faccel.inference.strategies import placement_for
from faccel.inference.weight_files import (
    StoredWeight,
    WeightReader,
    check_ties,
    stored_weights,
    weights_by_name,
)
from faccel.plan import Plan
from faccel.tree import Tree

Budget = Mapping[str, str | int]
_STRATEGY = "balanced"


@effectful(updates("model"), AMBIENT, COLLECTIVE)
def place(
    model: nn.Module,
    path: str | os.PathLike[str],
    ctx: DistContext,
    *,
    budget: Budget | None = None,
    strategy: str | Mapping[str, str] = _STRATEGY,
    placement: Placement | None = None,
    dtype: torch.dtype | None = None,
    plan: Plan | None = None,
    sample: Tree = None,
) -> PlacedModel:
    """Load a model from safetensors files onto devices, for inference within a budget of memory.

    Effects: updates model, ambient, collective. Each rank has a model of its device. Units on
    "disk" are read from the files before each use, while the unit before them computes; nothing is
    copied to another file. Buffers stay on the device that computes.

    Args:
        model: A module, best built inside of `on_meta()`.
        path: A directory with `model.safetensors`, the name of diffusers, or an index; or a file.
        ctx: The world.
        budget: Bytes of weights by device, such as `{"cuda:0": "20GB", "cpu": "60GB", "disk":
            "200GB"}`. Activations need memory besides. None is 90 % of the free memory of
            `ctx.device` and of the host, and the disk.
        strategy: See `placement_for`.
        placement: Instead of a budget and a strategy: from `placement_for`, and edited.
        dtype: That floating-point weights are cast to while they are read, such as
            `torch.bfloat16`; None is the model's dtypes.
        plan: For its `units`; None is `Plan()`.
        sample: Arguments of forward, which runs once without values: a parameter that is used
            outside of the forward of its unit raises before anything is loaded. A tuple has
            positional arguments, a mapping keywords. None: it raises at its first use.

    Raises:
        ConfigError: The budget is too small for the largest unit, or for the model. Or `placement`
            is given with a budget or a strategy, or is one of another model or dtype.
        CheckpointError: Names or shapes in the files differ from the model's; the message names
            them. The model is unchanged after any error.
        ModelError: A buffer is on the meta device and is not in the files, or `sample` shows a
            use outside of a unit.

    Examples:
        >>> import tempfile
        >>> from faccel.checkpoint import export_model
        >>> from faccel.testing import fake_context
        >>> ctx, net = fake_context(0, 1), torch.nn.Sequential(*[torch.nn.Linear(9, 9)] * 1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = export_model(net, folder, ctx)
        ...     placed = place(net, folder, ctx, budget={"cpu": 400, "disk": "1GB"})
        ...     placed(torch.zeros(2, 9)).shape, placed.placement.device_map
        (torch.Size([2, 9]), {'0': 'cpu'})
    """
    call = "faccel.inference.place(model, path, ctx)"
    require_context(ctx, call)
    absolute = path_argument("model", model, path, call)
    instance_of("model", model, nn.Module, fix="pass the module itself", error=ModelError)
    check_not_compiled(model)
    check_placeable(model)
    plan = plan_argument(plan)
    _check_choice(budget, strategy, placement)
    ctx.comm.begin_call("place")
    if placement is None:
        if budget is None:
            budget = default_budget(ctx)
        placement = placement_for(model, budget, strategy=strategy, dtype=dtype, plan=plan)
    # Filled below, after the checks that need no file.
    weights: dict[str, StoredWeight] = {}
    reader = WeightReader()

    def read(name: str, tensor: torch.Tensor, start: int) -> None:
        reader.read(weights[name], tensor, start)

    loader = Loader(model, placement, plan, dtype, read)

    def find() -> None:
        loader.check_uses(sample)
        stored = stored_weights(absolute)
        weights.update(weights_by_name(tensors_of(model), stored))
        check_ties(tensors_of(model), stored, reader)
        check_buffers(model, weights)

    on_all_ranks(find, ctx, "find the weights of the model")
    on_all_ranks(lambda: loader.read(weights), ctx, "read the weights")
    return PlacedModel(model, placement, ctx, loader.install(reader.close))


def _check_choice(
    budget: Budget | None, strategy: str | Mapping[str, str], placement: Placement | None
) -> None:
    if placement is None:
        return
    fix = "write `placement=faccel.inference.placement_for(model, budget)`"
    instance_of("placement", placement, Placement, fix=fix)
    # They would have no effect: the placement has the budget that it was made for.
    if budget is not None or strategy != _STRATEGY:
        raise ConfigError(
            "`placement` is used instead of `budget` and `strategy`",
            got=f"budget={short_repr(budget)}, strategy={short_repr(strategy)}",
            fix="remove them, or pass them to `faccel.inference.placement_for`",
        )
