"""Options of backward under FSDP2, and the parameters whose gradients it averages."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import Any, Protocol, cast

import attrs
import torch
from torch import nn
from torch.optim import Optimizer

from faccel.backends.fsdp_unreduced import fsdp_params, unsharded_param
from faccel.errors import ModelError
from faccel.grad_reducer import GradReducer, name_of
from faccel.tree import is_dtensor
from faccel.update_options import BackwardOptions


class _Engine(Protocol):
    """What runs the model: `FsdpEngine`."""

    def recover(self) -> None:
        """Drop what a backward that has raised left."""
        ...

    def reset(self) -> None:
        """Drop all gradients, and what an unfinished forward or backward left."""
        ...


@attrs.frozen(eq=False)
class ShardedGrads:
    """The gradients of a model that FSDP2 has sharded; a `GradReducer`.

    Args:
        module: The user's module.
        param_ids: The `id` of each sharded parameter. Those that a plan ignores are left out: FSDP2
            does not average their gradients.
        engine: What runs the model.
    """

    module: nn.Module
    param_ids: AbstractSet[int]
    _engine: _Engine

    def before_backward(self, loss: torch.Tensor, options: BackwardOptions) -> None:
        """Raise for an option that FSDP2 does not support."""
        if options.create_graph:
            raise ModelError(
                "`create_graph=True` is unsupported where parameters are sharded",
                got="a model under FSDP2, which reduces gradients without a graph",
                fix="train replicas, with `faccel.init(mesh=faccel.MeshSpec(dp_replicate=-1))`",
            )

    def graph_inputs(self, inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Return `inputs` with gathered parameters in place of sharded ones."""
        gathered: dict[int, torch.Tensor] = {}
        for fsdp_param in fsdp_params(self.module):
            full = unsharded_param(fsdp_param)
            if full is not None:
                gathered[id(fsdp_param.sharded_param)] = full
        return [gathered.get(id(tensor), tensor) for tensor in inputs]

    def after_backward(self, options: BackwardOptions) -> None:
        """Do nothing: FSDP2 has reduced the gradients."""

    def after_failed_backward(self) -> None:
        """Drop what a backward that has raised left."""
        self._engine.recover()

    def discard(self) -> None:
        """Drop all gradients, and what an unfinished forward or backward left."""
        self._engine.reset()

    def check_step(self, opt: Optimizer) -> None:
        """Do nothing: gradients that are not reduced are not in `.grad`."""

    def after_step(self, opt: Optimizer) -> None:
        """Do nothing."""

    def name_of(self, param: torch.Tensor) -> str | None:
        """Return the name of a parameter that the model has now, else None."""
        return name_of(self.module, param)


def sharded_grads(module: nn.Module, engine: nn.Module) -> GradReducer:
    """Return the reducer of a model after `fully_shard`."""
    params = [param for param in module.parameters() if is_dtensor(param)]
    # Any: `Parallelism` has one type for the engines of all strategies.
    return ShardedGrads(module, frozenset(map(id, params)), cast("Any", engine))
