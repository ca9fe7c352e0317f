"""The memory of a rank at its peak: parameters, gradients, optimizer states, and the rest."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from itertools import chain

import attrs
import torch
from torch import nn
from torch.optim import Optimizer

from faccel import device_table
from faccel.checks import integer
from faccel.context import DistContext, require_context
from faccel.device_table import is_host
from faccel.effects import AMBIENT, effectful
from faccel.errors import ConfigError
from faccel.tree import Tree, flatten


@attrs.frozen
class PeakMemory:
    """Bytes on the device of this rank, by category.

    Args:
        parameters: Parameters and buffers of the models; of sharded ones this rank's shards.
        gradients: One gradient for each parameter that is trained, as at the end of backward.
        optimizer: States of the optimizers; 0 before their first step.
        activations: The rest of the peak: activations, gathered parameters, buffers of
            communication, batches. None where the peak is unknown.
        peak: The most bytes that tensors had at one time; None on the CPU.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int | None
    peak: int | None


@effectful(AMBIENT)
def peak_memory(state: Tree, ctx: DistContext, *, peak_bytes: int | None = None) -> PeakMemory:
    """Return what the memory of this rank's device is used for at its peak.

    Effects: ambient. Reads the allocator's counter without waiting for the device, unless
    `peak_bytes` is passed. Tensors on other devices, such as offloaded ones, do not count.

    Args:
        state: Any nesting of models and optimizers, as for `save`; other values are ignored.
        ctx: The context.
        peak_bytes: The peak. None asks the device; on the CPU it is unknown then, because the
            system reports that of the process only.

    Raises:
        ConfigError: `state` has neither a model nor an optimizer.

    Examples:
        >>> from faccel.testing import fake_context
        >>> peak_memory({"model": nn.Linear(9, 1)}, fake_context(0, 1), peak_bytes=100)
        PeakMemory(parameters=40, gradients=40, optimizer=0, activations=20, peak=100)
    """
    require_context(ctx, 'faccel.tracking.peak_memory({"model": model, "opt": opt}, ctx)')
    if peak_bytes is None and not is_host(ctx.device):
        peak_bytes = device_table.peak_bytes(ctx.device)
    if peak_bytes is not None:
        integer("peak_bytes", peak_bytes, at_least=0)
    leaves = flatten(state)[0]
    optimizers = [leaf for leaf in leaves if isinstance(leaf, Optimizer)]
    modules = list(_modules(leaves))
    if not modules and not optimizers:
        raise ConfigError(
            "`state` has neither a model nor an optimizer",
            got=f"an object of type {type(state).__name__}",
            fix='write `peak_memory({"model": model, "opt": opt}, ctx)`',
        )
    # A list, because parameters are counted twice: once in place of their gradients.
    params = list(chain.from_iterable(map(nn.Module.parameters, modules)))
    buffers = chain.from_iterable(map(nn.Module.buffers, modules))
    states = chain.from_iterable(map(_states, optimizers))
    parameter_bytes = _num_bytes(chain(params, buffers), ctx)
    gradient_bytes = _num_bytes(map(_gradient, filter(_is_trained, params)), ctx)
    optimizer_bytes = _num_bytes(states, ctx)
    activation_bytes = None
    if peak_bytes is not None:
        # At least 0: a state may be larger than what the device has counted since a reset.
        used_bytes = parameter_bytes + gradient_bytes + optimizer_bytes
        activation_bytes = max(0, peak_bytes - used_bytes)
    return PeakMemory(
        parameter_bytes, gradient_bytes, optimizer_bytes, activation_bytes, peak_bytes
    )


class WeakState:
    """Models and optimizers that are not kept alive.

    Args:
        state: Any nesting of them.
    """

    def __init__(self, state: Tree) -> None:
        self._references: list[weakref.ref[object]] = []
        for leaf in flatten(state)[0]:
            if isinstance(leaf, Optimizer) or any(True for _ in _modules([leaf])):
                self._references.append(weakref.ref(leaf))

    def peak_memory(self, ctx: DistContext) -> PeakMemory | None:
        """Return what those that are alive use; None if there is none."""
        leaves: list[Tree] = []
        for reference in self._references:
            leaf = reference()
            if leaf is not None:
                leaves.append(leaf)
        if not leaves:
            return None
        return peak_memory(leaves, ctx)


def _modules(leaves: Iterable[Tree]) -> Iterator[nn.Module]:
    for leaf in leaves:
        module = leaf
        if not isinstance(leaf, nn.Module):  # a wrapped model has the user's module
            module = getattr(leaf, "module", None)
        if isinstance(module, nn.Module):
            yield module


def _states(opt: Optimizer) -> Iterator[torch.Tensor]:
    # Numbers among the states, such as a step, are in the memory of Python.
    for state in opt.state.values():
        for value in flatten(state)[0]:
            if isinstance(value, torch.Tensor):
                yield value


def _is_trained(param: torch.Tensor) -> bool:
    return param.requires_grad


def _gradient(param: torch.Tensor) -> torch.Tensor:
    """Return the gradient, or in its place the parameter: `optimizer_step` has dropped it."""
    if param.grad is None:
        return param
    return param.grad


def _num_bytes(tensors: Iterable[torch.Tensor], ctx: DistContext) -> int:
    """Return the bytes of tensors on the device of the context; tied ones count once."""
    # By identity: equality of tensors compares elements.
    by_id = {id(tensor): tensor for tensor in tensors}
    total = 0
    for tensor in by_id.values():
        for plain in _plain_tensors(tensor):
            if plain.device.type == ctx.device.type:
                total += plain.nbytes
    return total


def _plain_tensors(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield what a tensor consists of: a sharded one of its shard, one of 8 bits of its parts."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()  # pyright: ignore
    for name in names:
        value = getattr(tensor, name)
        if isinstance(value, torch.Tensor):  # of a DTensor, its mesh has a name, too
            yield from _plain_tensors(value)
