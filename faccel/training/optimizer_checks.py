"""Checks that an optimizer was made from the parameters of a wrapped model."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from weakref import WeakSet

import torch
from torch import nn
from torch.optim import Optimizer

from faccel.errors import OptimizerError

# Weak, because nothing may be set on the user's optimizer, nor keep it alive.
_MADE_BEFORE_WRAP: WeakSet[Optimizer] = WeakSet()


def check_owns_parameters(opt: Optimizer, params: Iterable[torch.Tensor]) -> None:
    """Raise unless `opt` steps at least one of the parameters of a model.

    Raises:
        OptimizerError: It steps none.
    """
    if not _has_any(opt, set(map(id, params))):
        raise OptimizerError(
            "`opt` has no parameter of the wrapped model",
            got=f"a {type(opt).__name__} made before `wrap`, or for another model",
            fix=_FIX,
        )


def check_steps_gradients(opt: Optimizer) -> None:
    """Raise for an optimizer that does not step with `.grad` as it is after backward.

    Raises:
        OptimizerError: It copies gradients in backward.
    """
    # Its hooks copy each gradient before ranks have reduced it, and before it is unscaled and
    # clipped: replicas would train apart, without an error.
    if type(opt).__module__ == "torchao.optim.cpu_offload":
        raise OptimizerError(
            "this optimizer copies gradients to the host in backward, before they are reduced, "
            "unscaled or clipped",
            got=f"a {type(opt).__name__} of torchao",
            fix='write `faccel.init(mesh="dp_shard=-1")` and `faccel.Plan(offload=True)`, with '
            "`torch.optim.AdamW`",
        )


def check_trainable_dtypes(opt: Optimizer) -> None:
    """Raise for a trainable parameter in fp8, in which almost every update is rounded away.

    Raises:
        OptimizerError: There is one.
    """
    for group in opt.param_groups:
        for param in group["params"]:
            if param.requires_grad and param.is_floating_point() and param.dtype.itemsize == 1:
                raise OptimizerError(
                    "an optimizer cannot train a parameter that is stored in fp8",
                    got=f"a parameter of shape {list(param.shape)} in {param.dtype}",
                    fix="leave `layerwise_casting` out of the plan, or cast the model, such as "
                    "with `net.to(torch.bfloat16)`, before `faccel.wrap(net, ctx)`",
                )


def note_optimizers(module: nn.Module) -> None:
    """Note the optimizers that have parameters of a module which is about to be wrapped.

    Nothing else shows the order: DDP and one process keep the parameters, FSDP2 replaces them.
    For debug mode, because it is a pass over all objects of the process.
    """
    param_ids = set(map(id, module.parameters()))
    optimizer_types = _all_subclasses(Optimizer)
    for candidate in gc.get_objects():
        # Not `isinstance`, which asks the `__class__` of proxies and imports lazy modules.
        if type(candidate) in optimizer_types and _has_any(candidate, param_ids):
            _MADE_BEFORE_WRAP.add(candidate)


def check_made_after_wrap(opt: Optimizer) -> None:
    """Raise if `note_optimizers` has noted `opt`.

    Raises:
        OptimizerError: It has.
    """
    if opt in _MADE_BEFORE_WRAP:
        raise OptimizerError(
            "`opt` was made before `wrap`, which replaces parameters on a mesh that shards them",
            got=f"a {type(opt).__name__} with parameters of the module itself",
            fix=_FIX,
        )


_FIX = (
    "write `model = faccel.wrap(net, ctx)` first, then make the optimizer from `model.parameters()`"
)


def _has_any(opt: Optimizer, param_ids: set[int]) -> bool:
    # By identity: `==` of tensors compares elements. Another thread may be constructing `opt`.
    for group in getattr(opt, "param_groups", ()):
        for param in group["params"]:
            if id(param) in param_ids:
                return True
    return False


def _all_subclasses(cls: type) -> set[type]:
    classes = {cls}
    for subclass in cls.__subclasses__():
        classes |= _all_subclasses(subclass)
    return classes
