"""The check before an update that replicas apply the same gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.optim import Optimizer

from faccel.context import DistContext
from faccel.errors import OptimizerError
from faccel.grad_reducer import GradReducer
from faccel.tree import is_dtensor


def check_gradients(
    opt: Optimizer, params: Sequence[torch.Tensor], ctx: DistContext
) -> Sequence[GradReducer]:
    """Raise if data ranks may have different gradients; return the reducers of `params`.

    Args:
        opt: The optimizer, for the messages and as a key.
        params: The parameters with gradients that `opt` is about to step.
        ctx: The context.

    Raises:
        OptimizerError: No wrapped model of this context averages the gradient of a parameter, or a
            gradient was not reduced.
        ModelError: The last loss left out parameters, or parameters of replicas differ.
    """
    spec = ctx.mesh.spec
    # One process, or one replica of a tensor-parallel model: nothing has to be averaged.
    if spec.data_world_size * spec.cp == 1:
        return ()
    owners: list[GradReducer] = []
    # Sets of `id`, which C compares: an update has no loop over parameters here.
    remaining = set(map(id, params))
    for reducer in ctx.lifetime.reducers():
        if not remaining.isdisjoint(reducer.param_ids):
            remaining.difference_update(reducer.param_ids)
            owners.append(reducer)
    for reducer in owners:
        reducer.check_step(opt)
    if remaining:
        first = next(param for param in params if id(param) in remaining)
        raise _unowned_error(opt, first, ctx)
    return owners


def _unowned_error(opt: Optimizer, param: torch.Tensor, ctx: DistContext) -> OptimizerError:
    problem = "`opt` has a parameter whose gradient is not averaged over the data ranks"
    for reducer in ctx.lifetime.reducers():
        name = reducer.name_of(param)
        if name is not None:
            return OptimizerError(
                problem,
                got=f"`{name}`, which was added, replaced, unfrozen or left out of sharding",
                fix="freeze it, or write `model = faccel.rewrap(model, ctx)` after the change",
            )
    got = f"{_position(opt, param)} of shape {list(param.shape)}, which no wrapped model has"
    if not ctx.lifetime.reducers():
        fix = "write `model = faccel.wrap(net, ctx)` first, and make the optimizer from "
        fix += "`model.parameters()`"
    elif is_dtensor(param):
        fix = "wrap its module with this `ctx`"
    else:
        fix = "wrap its module too, as in `criterion = faccel.wrap(criterion, ctx)`"
    return OptimizerError(problem, got=got, fix=fix)


def _position(opt: Optimizer, param: torch.Tensor) -> str:
    for group_index, group in enumerate(opt.param_groups):
        for index, candidate in enumerate(group["params"]):
            if candidate is param:
                return f"parameter {index} of group {group_index}"
    return "a parameter"
