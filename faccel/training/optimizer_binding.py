"""Optimizers of wrapped models: what a step needs to know about the model of its optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from weakref import WeakKeyDictionary

import attrs
import torch
from torch.optim import Optimizer

from faccel.checks import instance_of
from faccel.context import DistContext
from faccel.effects import COLLECTIVE, effectful, updates
from faccel.errors import OptimizerError
from faccel.training.model import (
    WrappedModel,
    check_context,
    check_wrapped,
    describe_context,
    is_same_world,
)
from faccel.training.optimizer_checks import (
    check_made_after_wrap,
    check_owns_parameters,
    check_steps_gradients,
    check_trainable_dtypes,
)
from faccel.training.precision import StepGuard, guard_steps
from faccel.training.true_precision import prepare_optimizer


@attrs.frozen(eq=False)
class OptimizerBinding:
    """The facts that `optimizer_step` needs about the model of an optimizer.

    Args:
        ctx: The context that the model was wrapped with.
        tied_copies: As in `Parallelism.tied_copies`.
        guard: The hook that allows no other step in fp16; None in other precisions.
    """

    ctx: DistContext
    tied_copies: Mapping[int, str]
    guard: StepGuard | None


# `optimizer_step` receives the optimizer but not the model. A table of weak keys, because nothing
# may be set on the user's optimizer, nor keep it alive. It has no engine, which may hold the key.
_BINDINGS: WeakKeyDictionary[Optimizer, OptimizerBinding] = WeakKeyDictionary()


@effectful(updates("opt"), COLLECTIVE)
def wrap_optimizer(opt: Optimizer, model: WrappedModel, ctx: DistContext) -> Optimizer:
    """Connect `opt` to the engine that runs `model`.

    Effects: updates opt, collective. One process, DDP and FSDP2 return `opt` itself.

    `DdpConfig(shard_optimizer=True)` and DeepSpeed return another optimizer, which takes over the
    options and the state of `opt`: make schedulers from the returned one.

    Args:
        opt: Made from `model.parameters()`, after `wrap`.
        model: From `wrap`.
        ctx: The context that `model` was wrapped with.

    Returns:
        The optimizer to step with.

    Raises:
        ModelError: `model` is not wrapped, or was wrapped with another context.
        OptimizerError: `opt` is not an optimizer, or none of its parameters belongs to `model`. Or,
            in debug mode, it was made before `wrap`. Or its state has to be sharded, and it needs
            all parameters at once, does not step shards or has a scheduler already. Or it copies
            gradients in backward, or a trainable parameter is stored in fp8. Or stages of a
            pipeline would step the copies of a tied parameter with different options.

    Examples:
        >>> from faccel.testing import fake_context
        >>> from faccel.training.model import wrap
        >>> ctx = fake_context(0, 1)
        >>> model = wrap(torch.nn.Linear(2, 1), ctx)
        >>> opt = wrap_optimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, ctx)
    """
    instance_of(
        "opt",
        opt,
        torch.optim.Optimizer,
        fix="write `faccel.wrap_optimizer(opt, model, ctx)`",
        error=OptimizerError,
    )
    check_wrapped(model)
    check_context(model, ctx)
    check_steps_gradients(opt)
    check_owns_parameters(opt, model.parameters())
    check_trainable_dtypes(opt)
    if ctx.config.debug:
        check_made_after_wrap(opt)
    # An engine may return another optimizer; that one is passed to `optimizer_step`.
    connected = model.parallelism.wrap_optimizer(opt, model.engine, ctx)
    tied_copies = dict(model.parallelism.tied_copies(model.engine))
    # An optimizer may be connected to several models, one after the other.
    previous = _BINDINGS.get(connected)
    if previous is None:
        prepare_optimizer(opt, connected, ctx)
    else:
        tied_copies |= previous.tied_copies
    guard = guard_steps(connected, getattr(previous, "guard", None), ctx)
    _BINDINGS[connected] = OptimizerBinding(model.ctx, tied_copies, guard)
    return connected


def binding_of(opt: Optimizer, ctx: DistContext) -> OptimizerBinding | None:
    """Return the binding of an optimizer; None for one that `wrap_optimizer` did not return.

    Raises:
        OptimizerError: `ctx` is not the context of its model.
    """
    binding = _BINDINGS.get(opt)
    if binding is None or binding.ctx is ctx or is_same_world(ctx, binding.ctx):
        return binding
    raise OptimizerError(
        "`ctx` is not the context that the model of `opt` was wrapped with",
        got=f"{describe_context(ctx)}, for an optimizer of {describe_context(binding.ctx)}",
        fix="pass the `ctx` that you passed to `faccel.wrap` and `faccel.wrap_optimizer`",
    )


def tied_copies_of(
    opt: Optimizer, binding: OptimizerBinding | None, ctx: DistContext
) -> Mapping[int, str]:
    """Return the parameters of this rank whose gradients another rank counts.

    Raises:
        OptimizerError: On a pipeline, `opt` has no binding.
    """
    if binding is not None:
        return binding.tied_copies
    if ctx.mesh.spec.pp > 1:
        raise OptimizerError(
            "`opt` was not returned by `wrap_optimizer`, so tied parameters would count twice",
            got=f"a {type(opt).__name__}",
            fix="write `opt = faccel.wrap_optimizer(opt, model, ctx)` first",
        )
    return {}


def all_tied_copies(ctx: DistContext) -> Mapping[int, str]:
    """Return `tied_copies` of all models of `ctx` that have an optimizer.

    Raises:
        OptimizerError: On a pipeline, no model has one.
    """
    # Other meshes have no copies: nothing is searched.
    if ctx.mesh.spec.pp == 1:
        return {}
    copies: dict[int, str] = {}
    is_bound = False
    for binding in _BINDINGS.values():
        if binding.ctx is ctx or is_same_world(ctx, binding.ctx):
            copies.update(binding.tied_copies)
            is_bound = True
    if not is_bound:
        raise OptimizerError(
            "no optimizer was returned by `wrap_optimizer`, so tied parameters would count twice",
            got=str(ctx.mesh.spec),
            fix="write `opt = faccel.wrap_optimizer(opt, model, ctx)` first",
        )
    return copies
