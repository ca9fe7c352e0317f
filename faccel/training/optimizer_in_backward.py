"""Optimizer steps inside backward: each parameter is updated as soon as its gradient is ready."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch.optim import Optimizer

from faccel.context import DistContext, require_context
from faccel.effects import effectful, updates
from faccel.errors import ConfigError
from faccel.training.model import WrappedModel, check_context, check_wrapped
from faccel.training.optimizer_checks import check_owns_parameters


@effectful(updates("model"), updates("opt"))
def step_in_backward(
    opt: Optimizer, model: WrappedModel, ctx: DistContext
) -> AbstractContextManager[None]:
    """Return a context in which backward steps `opt`, parameter by parameter.

    Effects: updates model, updates opt. Each `scaled_backward` inside steps and frees gradients.

    A gradient is freed after its parameter is updated, so memory never holds all gradients. There
    is no `optimizer_step`: no clipping, no loss scale and no skipped update. Run only the last
    micro-batch of a window inside. State and options are those of `opt`, so schedulers and
    checkpoints work.

    Args:
        opt: From `wrap_optimizer`.
        model: From `wrap`.
        ctx: One process, or a mesh that shards parameters (FSDP2).

    Raises:
        ConfigError: The precision is fp16, which decides about an update from all gradients. Or
            the mesh has replicas (DDP), which keeps gradients in buckets, or a pipeline.
        ModelError: `model` is not wrapped, or was wrapped with another context.
        OptimizerError: `opt` has no parameter of `model`.

    Examples:
        >>> from faccel.training.model import wrap
        >>> from faccel.training.precision import init_scaler
        >>> from faccel.training.backward import scaled_backward
        >>> from faccel.testing import fake_context
        >>> ctx = fake_context(0, 1)
        >>> model = wrap(torch.nn.Linear(1, 1, bias=False), ctx)
        >>> opt = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with step_in_backward(opt, model, ctx):
        ...     scaler = scaled_backward(model(torch.ones(1, 1)).sum(), init_scaler(ctx), ctx)
        >>> model.weight.grad is None
        True
    """
    require_context(ctx, "faccel.parallel.step_in_backward(opt, model, ctx)")
    check_wrapped(model)
    check_context(model, ctx)
    spec = ctx.mesh.spec
    # An update is skipped if any gradient overflows, which is known only after the last one.
    if ctx.config.mixed_precision == "fp16":
        raise ConfigError(
            "`step_in_backward` does not support fp16: its loss scale needs all gradients at once",
            got='mixed_precision="fp16"',
            fix='use `mixed_precision="bf16"`, or `faccel.optimizer_step`',
        )
    # DDP reduces buckets of gradients after these hooks, and a pipeline accumulates micro-batches.
    if spec.size > 1 and (spec.pp > 1 or ctx.is_replicated):
        raise ConfigError(
            "`step_in_backward` does not support this mesh: backward has no single gradients",
            got=str(spec),
            fix="use a mesh with `dp_shard`, or `faccel.optimizer_step`",
        )
    check_owns_parameters(opt, model.parameters())
    return _stepping(opt)


@contextmanager
def _stepping(opt: Optimizer) -> Generator[None]:
    handles = [
        param.register_post_accumulate_grad_hook(_step_hook(opt, group))
        for group in opt.param_groups
        for param in group["params"]
        if param.requires_grad
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _step_hook(opt: Optimizer, group: dict[str, Any]) -> Callable[[torch.Tensor], None]:
    """Return a hook that steps one parameter of `group` with the state of `opt`.

    It steps a copy of `opt` that has the same state and one parameter. The copy is made without
    its constructor, which would make new state.
    """
    # A scheduler sets a `step` that is bound to `opt` on the instance; the copy needs its own.
    attributes = {name: value for name, value in vars(opt).items() if name != "step"}

    def step(param: torch.Tensor) -> None:
        one_param = object.__new__(type(opt))
        one_param.__dict__.update(attributes)
        one_param.param_groups = [{**group, "params": [param]}]
        # The group's options are read now, so that a scheduler's new rate counts.
        one_param.step()
        param.grad = None

    return step
