"""`offload`: a model that is in memory already is moved to the host or to a file."""

from __future__ import annotations

import os
import shutil

import torch
from torch import nn

from faccel.checkpoint.arguments import path_argument
from faccel.checkpoint.files import Slice, write_safetensors
from faccel.checkpoint.rank_calls import on_all_ranks
from faccel.checks import instance_of, one_of
from faccel.context import DistContext, require_context
from faccel.effects import AMBIENT, COLLECTIVE, effectful, updates
from faccel.errors import CheckpointError, ConfigError, ModelError
from faccel.inference.budget import DISK, size_text
from faccel.inference.loading import Loader, check_placeable, copy_range, tensors_of
from faccel.inference.place_model import Budget
from faccel.inference.placed_model import PlacedModel
from faccel.inference.placement import Placement
from faccel.inference.placement_units import plan_argument
from faccel.inference.strategies import placement_for
from faccel.inference.weight_files import (
    StoredWeight,
    WeightReader,
    stored_weights,
    weights_by_name,
)
from faccel.plan import Plan
from faccel.tree import Tree

_LARGE = 2**62  # bytes


@effectful(updates("model"), AMBIENT, COLLECTIVE)
def offload(
    model: nn.Module,
    to: str,
    ctx: DistContext,
    *,
    folder: str | os.PathLike[str] | None = None,
    budget: Budget | None = None,
    plan: Plan | None = None,
    sample: Tree = None,
) -> PlacedModel:
    """Move the weights of a model to the host, or to a file; units are in memory while they run.

    Effects: updates model, ambient, collective. For "disk", each rank writes a file into `folder`.

    Args:
        model: A module in memory. A parameter that other modules run inside of stays there.
        to: "cpu", for a context on an accelerator; or "disk".
        ctx: The world.
        folder: For "disk": where the file is written.
        budget: Bytes by device, as in `place`. None is room for the two largest units in use.
        plan: For its `units`; None is `Plan()`.
        sample: Arguments of forward, as in `place`.

    Raises:
        ConfigError: `to` is "cpu" where the CPU computes, or `folder` is missing.
        CheckpointError: The folder has no space for the weights. The model is unchanged.
        ModelError: The model is placed already, or has parameters on the meta device.

    Examples:
        >>> import tempfile
        >>> from faccel.testing import fake_context
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 1))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     placed = offload(net, "disk", fake_context(0, 1), folder=folder)
        ...     placed(torch.zeros(2, 3)).shape, placed.placement.device_map
        (torch.Size([2, 1]), {'0': 'disk', '1': 'disk'})
    """
    call = 'faccel.inference.offload(model, "disk", ctx, folder=folder)'
    require_context(ctx, call)
    one_of("to", to, ("cpu", DISK))
    instance_of("model", model, nn.Module, fix="pass the module itself", error=ModelError)
    check_placeable(model)
    _check_values(model)
    plan = plan_argument(plan)
    ctx.comm.begin_call("offload")
    placement = _placement(model, to, ctx, budget, plan)
    if to == "cpu":
        return _on_host(model, placement, plan, ctx, sample)
    if folder is None:
        raise ConfigError('`offload` to "disk" needs a `folder`', fix=f"write `{call}`")
    directory = path_argument("model", model, folder, call)
    # One file per rank: ranks of one node may share the folder, and have other shards.
    file = os.path.join(directory, f"offloaded-{ctx.rank}.safetensors")
    weights: dict[str, StoredWeight] = {}
    reader = WeightReader()

    def read(name: str, tensor: torch.Tensor, start: int) -> None:
        reader.read(weights[name], tensor, start)

    loader = Loader(model, placement, plan, None, read)

    def write() -> None:
        loader.check_uses(sample)
        _write(model, file)
        weights.update(weights_by_name(tensors_of(model), stored_weights(file)))

    on_all_ranks(write, ctx, "write the offloaded weights")
    on_all_ranks(lambda: loader.read(weights), ctx, "read the weights")
    return PlacedModel(model, placement, ctx, loader.install(reader.close))


def _check_values(model: nn.Module) -> None:
    for name, param in model.named_parameters():
        if param.is_meta:
            raise ModelError(
                "`offload` needs a model in memory",
                got=f"`{name}` on the device meta",
                fix="write `faccel.inference.place(model, path, ctx, budget=...)`",
            )


def _placement(
    model: nn.Module, to: str, ctx: DistContext, budget: Budget | None, plan: Plan
) -> Placement:
    device = str(ctx.device)
    if to == device:
        raise ConfigError(
            '`offload` to "cpu" needs a context on an accelerator',
            got=f"a context on {device}",
            fix='write `faccel.inference.offload(model, "disk", ctx, folder=folder)`',
        )
    # Everything fits: only the sizes of the units are used.
    plain = placement_for(model, {device: _LARGE, to: _LARGE}, plan=plan)
    device_map: dict[str, str] = {}
    sizes: list[int] = []
    for unit in plain.units:
        device_map[unit.name] = device if unit.is_pinned else to
        sizes.append(unit.num_bytes)
    # One unit computes while the next one is read.
    if budget is None:
        room = plain.pinned_bytes + sum(sorted(sizes)[-2:])
        budget = {device: max(room, 1), to: _LARGE}
    return placement_for(model, budget, strategy=device_map, plan=plan)


def _write(model: nn.Module, path: str) -> None:
    folder = os.path.dirname(path)
    # Another model may still read it.
    if os.path.exists(path):
        raise CheckpointError(
            "the folder has offloaded weights of an earlier call",
            got=f"`{path}`",
            fix="choose another `folder`, or delete the file if its model is no longer used",
        )
    os.makedirs(folder, exist_ok=True)
    # A tied tensor is written once, under its first name.
    tensors: dict[int, tuple[str, torch.Tensor]] = {}
    for name, tensor in tensors_of(model).items():
        tensors.setdefault(id(tensor), (name, tensor.detach()))
    needed = 0
    for _, tensor in tensors.values():
        needed += tensor.numel() * tensor.element_size()
    # Before the first byte: a full disk would end other programs, too.
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CheckpointError(
            "the folder has no space for the weights",
            got=f"{size_text(free)} free in `{folder}` for {size_text(needed)}",
            fix="free space, or choose another `folder`",
        )
    slices: list[Slice] = []
    for name, tensor in tensors.values():
        slices.append(Slice(name, tensor, [0] * tensor.ndim, tensor.shape))
    write_safetensors(folder, os.path.basename(path), slices, metadata={"format": "pt"})


def _on_host(
    model: nn.Module, placement: Placement, plan: Plan, ctx: DistContext, sample: Tree
) -> PlacedModel:
    state = {name: tensor.detach() for name, tensor in tensors_of(model).items()}

    def read(name: str, tensor: torch.Tensor, start: int) -> None:
        copy_range(state[name], tensor, start)

    loader = Loader(model, placement, plan, None, read)
    on_all_ranks(lambda: loader.check_uses(sample), ctx, "run `sample` without values")
    on_all_ranks(lambda: loader.read(state), ctx, "move the weights to the host")
    # The loader has copies on the host; these would keep the accelerator's memory.
    state.clear()
    return PlacedModel(model, placement, ctx, loader.install(lambda: None))
