"""Models: from the user's module to one that runs on the ranks of a mesh, and back."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import attrs
import torch
from torch import nn

from faccel.context import DistContext
from faccel.effects import COLLECTIVE, effectful, updates
from faccel.errors import ConfigError, ModelError, OptimizerError
from faccel.plan import Plan
from faccel.protocols import Parallelism, RunMethod


@attrs.frozen(eq=False)
class WrappedModel:
    """A model that runs on the ranks of a mesh; made by `wrap`.

    Calling it, or a method of the user's class, runs with the strategy's hooks and the configured precision; floating
    point outputs come back as fp32. Any other attribute is the user's module's.

    Args:
        module: The user's module.
        engine: What torch's engine made of it; the module itself on one process.
        parallelism: How it runs.
        ctx: Where.
    """

    module: nn.Module
    engine: nn.Module = attrs.field(repr=False)
    parallelism: Parallelism = attrs.field(repr=False)
    ctx: DistContext = attrs.field(repr=False)
    _run: RunMethod = attrs.field(repr=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._run("forward", *args, **kwargs)

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method other than `forward`, such as `"generate"`, with the same hooks and precision."""
        if not callable(getattr(self.module, method, None)):
            raise ModelError(
                f"`{method}` is not a method of the model",
                got=f"a {type(self.module).__name__}",
                fix="name one of its methods",
            )
        return self._run(method, *args, **kwargs)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters, for an optimizer."""
        return self.module.parameters()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters under the user's names."""
        return self.module.named_parameters()

    def state_dict(self) -> dict[str, Any]:
        """Return parameters and buffers under the user's names, as they lie on the ranks."""
        state = self.parallelism.state
        return self.module.state_dict() if state is None else state.export(self.engine)

    def load_state_dict(self, state: Mapping[str, Any], *, strict: bool = True) -> None:
        """Take parameters and buffers as `state_dict` gives them, all unless not `strict`.

        Updates the model; collective where an engine shares it.
        """
        if self.parallelism.state is None:
            self.module.load_state_dict(state, strict=strict)
        else:
            self.parallelism.state.restore(self.engine, state)

    def train(self, mode: bool = True) -> WrappedModel:  # noqa: FBT001, FBT002 (torch's own signature)
        """Set training mode. Updates the model and returns it, as torch does.

        Collective where training mode ends and there are buffers, such as the statistics of batch norm: every data
        rank takes rank 0's, so that all of them evaluate one model.
        """
        if self.module.training and not mode:
            self.parallelism.sync_buffers(self.engine, self.ctx)
        self.module.train(mode)
        return self

    def eval(self) -> WrappedModel:
        """Set evaluation mode: `train(False)`."""
        return self.train(False)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "module":
            raise AttributeError(name)
        value = getattr(self.module, name)
        if not inspect.ismethod(value):
            return value
        if name == "forward" or not hasattr(nn.Module, name):
            return functools.partial(self.call, name)

        def torchs_own(*args: Any, **kwargs: Any) -> Any:
            out = value(
                *args, **kwargs
            )  # `to`, `requires_grad_`, ...: those that return the module return this
            return self if out is self.module else out

        return torchs_own


@effectful(updates("model"), COLLECTIVE)
def wrap(model: nn.Module, ctx: DistContext, *, plan: Plan | None = None) -> WrappedModel:
    """Return `model` as it runs on the ranks of the mesh.

    Effects: updates model, collective. Moves it to `ctx.device` (unless `device_placement` is off) and gives every
    data rank rank 0's parameters and buffers. Gradients are averaged over the data ranks in backward.

    Args:
        model: The user's module; stays theirs, and is what `unwrap` returns.
        ctx: The world.
        plan: How the model is run; None is `Plan()`.

    Returns:
        A callable record. Any number of models can be wrapped.

    Raises:
        ModelError: `model` is not a module, is wrapped already or has no parameters.
        ConfigError: `plan` is not a `Plan`.

    Examples:
        >>> from faccel.testing import fake_context
        >>> net = wrap(torch.nn.Linear(2, 1), fake_context(0, 1))
        >>> net(torch.zeros(3, 2)).shape, sorted(net.state_dict())
        (torch.Size([3, 1]), ['bias', 'weight'])
    """
    if isinstance(model, WrappedModel):
        raise ModelError(
            "this model is wrapped already", fix="wrap it once, and use what `wrap` returned"
        )
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ModelError(
            "`wrap` takes a torch module", got=f"a {type(model).__name__}", fix="pass an nn.Module"
        )
    if next(model.parameters(), None) is None:
        raise ModelError(
            "this model has no parameters",
            got=type(model).__name__,
            fix="use it as it is: there is nothing to train",
        )
    plan = Plan() if plan is None else plan
    if not isinstance(plan, Plan):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError(
            "`plan` takes a `Plan`", got=repr(plan), fix="write `plan=faccel.Plan(...)`"
        )
    if ctx.config.device_placement and not any(p.is_meta for p in model.parameters()):
        model.to(ctx.device)
    engine, run = ctx.parallelism.wrap(model, plan, ctx)
    return WrappedModel(model, engine, ctx.parallelism, ctx, run)


def unwrap(model: WrappedModel) -> nn.Module:
    """Return the user's own module, which shares its parameters with `model`.

    Effects: pure.

    Examples:
        >>> from faccel.testing import fake_context
        >>> net = torch.nn.Linear(2, 1)
        >>> unwrap(wrap(net, fake_context(0, 1))) is net
        True
    """
    return _wrapped(model).module


def _wrapped(model: Any) -> WrappedModel:
    if not isinstance(model, WrappedModel):
        raise ModelError(
            "this takes what `faccel.wrap` returned",
            got=f"a {type(model).__name__}",
            fix="wrap the model first",
        )
    return model


@effectful(updates("model"))
def grad_sync(model: WrappedModel, *, on: bool) -> AbstractContextManager[None]:
    """Make a context in which gradients are reduced over the data ranks in backward (`on`), or only accumulated.

    Effects: updates model, until the context is left; then it is as before, in both directions.

    Args:
        model: From `wrap`. Forward and backward must both be inside.
        on: `MicroBatch.sync`: True for the last micro-batch of a window.

    Examples:
        >>> from faccel.testing import fake_context
        >>> model = wrap(torch.nn.Linear(2, 1), fake_context(0, 1))
        >>> with grad_sync(model, on=False):
        ...     model(torch.zeros(3, 2)).sum().backward()
    """
    return _wrapped(model).parallelism.grad_sync(model.engine, on=on)


@effectful(updates("opt"), COLLECTIVE)
def wrap_optimizer(
    opt: torch.optim.Optimizer, model: WrappedModel, ctx: DistContext
) -> torch.optim.Optimizer:
    """Tie `opt` to the engine that runs `model`.

    Effects: updates opt, collective. Where the strategy has nothing to tie (one process, DDP) `opt` itself comes back
    as it was, so that one script moves to any strategy. With `DdpConfig(shard_optimizer=True)` another one comes back,
    which shares the options and the states that `opt` had: make schedulers from that.

    Args:
        opt: Made from the parameters of `model`, after `wrap`.
        model: From `wrap`.
        ctx: The world.

    Returns:
        The optimizer to step with.

    Raises:
        OptimizerError: No parameter of `opt` belongs to `model`: it was made before `wrap`, or for another model. Or
            its states are to be spread over ranks, and it looks at all parameters at once, or has a scheduler already.

    Examples:
        >>> from faccel.testing import fake_context
        >>> ctx = fake_context(0, 1)
        >>> model = wrap(torch.nn.Linear(2, 1), ctx)
        >>> opt = wrap_optimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, ctx)
    """
    own = {id(p) for p in _wrapped(model).parameters()}
    if not any(id(p) in own for group in opt.param_groups for p in group["params"]):
        raise OptimizerError(
            "no parameter of this optimizer belongs to the wrapped model",
            got=f"a {type(opt).__name__} made before `wrap`, or for another model",
            fix="write `model = faccel.wrap(net, ctx)` first, then make the optimizer from `model.parameters()`",
        )
    return model.parallelism.wrap_optimizer(opt, model.engine, ctx)
