"""Steps inside of backward: each parameter moves as soon as its gradient is there, which is then freed."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch.optim import Optimizer

from faccel.context import DistContext
from faccel.effects import effectful, updates
from faccel.errors import ConfigError, OptimizerError
from faccel.training.model import WrappedModel


@effectful(updates("model"), updates("opt"))
def step_in_backward(
    opt: Optimizer, model: WrappedModel, ctx: DistContext
) -> AbstractContextManager[None]:
    """Make a context in whose backward `opt` steps, parameter by parameter; gradients of all are never there at once.

    There is no `optimizer_step` then, hence no clipping, no loss scale and no skipped update. Put the last micro-batch
    of a window inside, the others before it. States and options are those of `opt`: schedulers and checkpoints work.

    Effects: updates model, updates opt. In each `scaled_backward` inside.

    Args:
        opt: From `wrap_optimizer`.
        model: From `wrap`.
        ctx: The world: one process, or a mesh that shares parameters (FSDP2).

    Raises:
        ConfigError: fp16, whose gradients are looked at together; or replicas (DDP), whose gradients live in buckets.
        OptimizerError: `opt` has no parameter of `model`.

    Examples:
        >>> from faccel.training.model import wrap
        >>> from faccel.training.precision import init_scaler
        >>> from faccel.training.step import scaled_backward
        >>> from faccel.testing import fake_context
        >>> ctx = fake_context(0, 1)
        >>> model = wrap(torch.nn.Linear(1, 1, bias=False), ctx)
        >>> opt = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with step_in_backward(opt, model, ctx):
        ...     scaler = scaled_backward(model(torch.ones(1, 1)).sum(), init_scaler(ctx), ctx)
        >>> model.weight.grad is None
        True
    """
    spec = ctx.mesh.spec
    if ctx.config.mixed_precision == "fp16":
        fix = 'use `mixed_precision="bf16"`, or `faccel.optimizer_step`'
        raise ConfigError(
            "fp16 decides about an update when it has seen all gradients", got="fp16", fix=fix
        )
    if spec.size > 1 and (spec.pp > 1 or ctx.is_replicated):
        fix = "use a mesh with `dp_shard`, or `faccel.optimizer_step`"
        raise ConfigError(
            "this mesh has no gradients of single parameters in backward", got=str(spec), fix=fix
        )
    own = {id(p) for p in model.parameters()}
    if not any(id(p) in own for group in opt.param_groups for p in group["params"]):
        fix = "make it from `model.parameters()`"
        raise OptimizerError(
            "no parameter of this optimizer belongs to the model", got=type(opt).__name__, fix=fix
        )
    return _stepping(opt)


@contextmanager
def _stepping(opt: Optimizer) -> Generator[None]:
    # a scheduler has put a `step` of this very optimizer in place of the class's
    own = {name: value for name, value in opt.__dict__.items() if name != "step"}

    def hook_of(group: dict[str, Any]) -> Any:
        def step(p: torch.Tensor) -> None:
            one = object.__new__(type(opt))  # shares the states; its group has this parameter alone
            one.__dict__.update(own)
            one.param_groups = [{**group, "params": [p]}]
            one.step()
            p.grad = None

        return step

    handles = [
        p.register_post_accumulate_grad_hook(hook_of(group))
        for group in opt.param_groups
        for p in group["params"]
        if p.requires_grad
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
