"""Wrapping a model again after the user changed its module."""

from __future__ import annotations

from faccel.context import DistContext, require_context
from faccel.effects import COLLECTIVE, consumes, effectful, updates
from faccel.training.model import WrappedModel, check_context, check_wrapped, registered
from faccel.training.move_module import move_module
from faccel.training.true_precision import cast_module


@effectful(updates("model"), consumes("model"), COLLECTIVE)
def rewrap(model: WrappedModel, ctx: DistContext) -> WrappedModel:
    """Wrap a model again after its module was changed, with the same plan.

    Effects: updates model, consumes model, collective. Copies rank 0's parameters and buffers to
    every data rank.

    After `wrap`, call it when parameters were added (adapters, layers), replaced (resized
    embeddings), frozen, unfrozen, cast to another dtype or initialized again. Optimizers stay:
    pass new parameters to them with `opt.add_param_group`. Models whose parameters are sharded
    support only changes of `requires_grad` and of values.

    Args:
        model: From `wrap`; it must not be called again.
        ctx: The context that `model` was wrapped with.

    Returns:
        The model to use instead.

    Raises:
        ModelError: `model` is not wrapped, or was wrapped with another context. Or ranks have
            different modules, or the strategy does not support the change.
        ConfigError: The strategy cannot change a model after `wrap`.

    Examples:
        >>> import torch
        >>> from faccel.testing import fake_context
        >>> from faccel.training.model import wrap
        >>> ctx = fake_context(0, 1)
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 2).requires_grad_(False))
        >>> model = wrap(net, ctx)
        >>> _ = net.append(torch.nn.Linear(2, 1))
        >>> model = rewrap(model, ctx)
        >>> sorted(model.state_dict())
        ['0.bias', '0.weight', '1.bias', '1.weight']
    """
    require_context(ctx, "model = faccel.rewrap(model, ctx)")
    check_wrapped(model)
    check_context(model, ctx)
    ctx.comm.begin_call("rewrap")
    from faccel.plan import Plan

    plan = model._plan or Plan()  # pyright: ignore[reportPrivateUsage]
    cast_module(model.module, ctx)  # new parameters
    places = model._places  # pyright: ignore[reportPrivateUsage]
    # New parameters are on the CPU. Shards may be there on purpose, when they are offloaded.
    if places and ctx.is_replicated:
        move_module(model.module, ctx.device)
    engine, run = model.parallelism.rewrap(model.module, model.engine, plan, ctx)
    model.ctx.lifetime.remove_model(model)
    return registered(
        WrappedModel(model.module, engine, model.parallelism, model.ctx, run, plan, places)
    )
