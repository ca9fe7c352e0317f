"""Initial values of a sharded model: rank 0's, also for ranks that build it on `meta`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import attrs
import torch
from torch import nn

from faccel.comm.objects import gather_json
from faccel.context import DistContext
from faccel.errors import ModelError
from faccel.parallel.param_hooks import hooks_of
from faccel.parallel.sync_states import broadcast_from_rank_0
from faccel.training.full_values import local_slice
from faccel.training.move_module import move_module
from faccel.tree import is_dtensor, local_tensor


@attrs.frozen(eq=False)
class InitialValues:
    """The values of a model before it is sharded.

    Args:
        is_meta: Whether a rank has no values. Rank 0's are then sent after sharding, because a
            rank that builds on `meta` may only have memory for its shards.
        full: Rank 0's values by name, where `is_meta`; empty on the other ranks.
        ties: The names of each tied parameter; `to_empty` unties them.
    """

    is_meta: bool
    full: Mapping[str, torch.Tensor] = attrs.field(repr=False)
    ties: Sequence[Sequence[str]]

    @classmethod
    def of(cls, module: nn.Module, ctx: DistContext, axis: str) -> InitialValues:
        """Collect the values. Without `meta`, copy rank 0's to every rank of the axis.

        Updates `module`; collective.
        """
        # Ranks must take the same branch, whatever this one has: the collectives differ.
        own_is_meta = has_meta(module)
        if not any(gather_json(own_is_meta, ctx, axis=axis)):
            broadcast_from_rank_0(_tensors(module), ctx, axis)
            return cls(is_meta=False, full={}, ties=())
        # Recorded first, because `to_empty` makes two parameters of a tied one.
        ties = tied_names(module)
        if ctx.comm.rank(axis) != 0:
            return cls(is_meta=True, full={}, ties=ties)
        if own_is_meta:
            _initialize(module)
            tie_parameters(module, ties)
        # Detached, so that sharding the model does not replace these values.
        full = {name: tensor.detach() for name, tensor in _tensors(module).items()}
        return cls(is_meta=True, full=full, ties=ties)

    def fill(self, module: nn.Module, ctx: DistContext, axis: str) -> None:
        """Write the values into the sharded model. Updates `module`; collective."""
        if not self.is_meta:
            return
        if has_meta(module):
            module.to_empty(device=ctx.device)
        else:
            move_module(module, ctx.device)
        tie_parameters(module, self.ties)
        with torch.no_grad():
            for name, tensor in _tensors(module).items():
                # One tensor at a time: a rank needs memory for its shards and one full tensor.
                value = self.full.get(name)
                if value is None:
                    value = torch.empty(tensor.shape, dtype=tensor.dtype)
                value = ctx.comm.broadcast(value.to(ctx.device), 0, axis)
                copy_shard(tensor, value)


def materialize(module: nn.Module, ctx: DistContext, axis: str) -> None:
    """Allocate a model on `meta` in full on every rank, with rank 0's initial values.

    Updates `module`; collective. Hooks and attributes of parameters stay.

    Raises:
        ModelError: A module with parameters or buffers has no `reset_parameters`.
    """
    hooks = hooks_of(module)
    values = InitialValues.of(module, ctx, axis)
    values.fill(module, ctx, axis)
    params = dict(module.named_parameters())
    # `to_empty` has replaced the parameters.
    for name, param_hooks in hooks.items():
        param_hooks.set_on(params[name])


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def has_meta(module: nn.Module) -> bool:
    """Return whether a parameter or a buffer is on the meta device."""
    return any(tensor.is_meta for tensor in _tensors(module).values())


def copy_shard(tensor: torch.Tensor, full: torch.Tensor) -> None:
    """Copy this rank's shard of `full` into `tensor`."""
    if not is_dtensor(tensor):
        tensor.copy_(full)
        return
    local_tensor(tensor).copy_(local_slice(full, tensor))


def tied_names(module: nn.Module) -> list[list[str]]:
    """Return the names of each parameter that has several."""
    names_by_param: dict[int, list[str]] = {}
    for name, param in module.named_parameters(remove_duplicate=False):
        names_by_param.setdefault(id(param), []).append(name)
    return [names for names in names_by_param.values() if len(names) > 1]


def tie_parameters(module: nn.Module, ties: Sequence[Sequence[str]]) -> None:
    """Tie parameters again: each name gets the parameter of the first name. Updates `module`."""
    for first, *others in ties:
        for name in others:
            parent, _, leaf = name.rpartition(".")
            # Not `setattr`, which calls a `__setattr__` that the user's module may define.
            params = module.get_submodule(parent)._parameters  # pyright: ignore[reportPrivateUsage]
            params[leaf] = module.get_parameter(first)


def _initialize(module: nn.Module) -> None:
    """Allocate a model on the CPU and call `reset_parameters` of its modules.

    Raises:
        ModelError: A module with parameters or buffers has no `reset_parameters`.
    """
    for name, submodule in module.named_modules():
        tensors = [*submodule.parameters(recurse=False), *submodule.buffers(recurse=False)]
        if tensors and not callable(getattr(submodule, "reset_parameters", None)):
            raise ModelError(
                "rank 0 built the model on meta, and a module has no `reset_parameters`",
                got=f"`{name or type(module).__name__}`, a {type(submodule).__name__}",
                fix="build the model with values on rank 0 (`if ctx.is_main`), and on meta on the "
                "other ranks",
            )
    # On the CPU, because the full model may be larger than the memory of one device.
    module.to_empty(device="cpu")
    for submodule in module.modules():
        reset_parameters = getattr(submodule, "reset_parameters", None)
        if callable(reset_parameters):
            reset_parameters()
