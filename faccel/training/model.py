"""Models: from the user's module to one that runs on the ranks of a mesh, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, NoReturn

import attrs
import torch
from torch import nn

from faccel.checks import instance_of, shown
from faccel.config import Config, text_of
from faccel.context import DistContext
from faccel.effects import COLLECTIVE, effectful, updates
from faccel.errors import ConfigError, ModelError, short_repr
from faccel.training import module_checks
from faccel.training.full_values import shard_full_values, with_tied_values
from faccel.training.move_module import move_module
from faccel.training.optimizer_checks import (
    note_optimizers,
)
from faccel.training.true_precision import cast_module
from faccel.tree import Tree

if TYPE_CHECKING:
    from faccel.plan import Plan
    from faccel.protocols import Parallelism, RunMethod


@attrs.frozen(eq=False)
class WrappedModel:
    """A model that runs on the ranks of a mesh; `wrap` returns it.

    `model(...)` runs `forward`, and `model.call("generate", ...)` any other method, with the
    strategy's hooks and the configured precision. Floating point outputs are returned as fp32.

    Reading any other attribute returns the attribute of the user's module as it is. A method read
    this way runs without hooks and precision: use it for what does not compute with parameters.

    Args:
        module: The user's module.
        engine: The module that the strategy runs, such as DDP's; `module` itself on one process.
        parallelism: The strategy.
        ctx: The context that the model was wrapped with.
        run: Calls a method through the engine.
        plan: The plan that the model was wrapped with.
        places: Whether `wrap` has moved it to the device of the context.
    """

    module: nn.Module
    engine: nn.Module = attrs.field(repr=False)
    parallelism: Parallelism = attrs.field(repr=False)
    ctx: DistContext = attrs.field(repr=False)
    _run: RunMethod = attrs.field(repr=False)
    _plan: Plan | None = attrs.field(default=None, repr=False)
    _places: bool = attrs.field(default=True, repr=False)

    def __call__(self, *args: Tree, **kwargs: Tree) -> Tree:
        with self.ctx.lifetime.span("forward"):
            return self._run("forward", *args, **kwargs)

    def forward(self, *args: Tree, **kwargs: Tree) -> Tree:
        """Run `forward` as calling the model does, with the strategy's hooks and precision."""
        return self(*args, **kwargs)

    def call(self, method: str, *args: Tree, **kwargs: Tree) -> Tree:
        """Run a method or a submodule with the strategy's hooks and precision.

        A loss may combine several calls: `model.call("decoder", model.call("encoder", x))`.

        Args:
            method: The name of a method such as `"generate"`, or of a submodule such as `"encoder"`
                or `"blocks.0"`.
            *args: Its arguments.
            **kwargs: Its keyword arguments.

        Raises:
            ModelError: The module has no such method or submodule.
        """
        module_checks.method_of(self.module, method)
        with self.ctx.lifetime.span("forward"):
            return self._run(method, *args, **kwargs)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters, for an optimizer."""
        return self.module.parameters()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters under the user's names."""
        state_io = self.parallelism.state
        if state_io is None or state_io.named_parameters is None:
            return self.module.named_parameters()
        return state_io.named_parameters(self.engine)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return parameters and buffers under the user's names; sharded ones stay sharded."""
        state_io = self.parallelism.state
        if state_io is None:
            return self.module.state_dict()
        return state_io.export(self.engine)

    def load_state_dict(self, state: Mapping[str, torch.Tensor], *, strict: bool = True) -> None:
        """Restore parameters and buffers in place, from what `state_dict` returned.

        Or from full tensors, which are equal on every rank: each takes its shards.

        Updates the model. Collective where the engine shards parameters.

        Raises:
            ModelError: A parameter that stages of a pipeline have under several names has
                different values.
        """
        if self.parallelism.state is None:
            tied_names = self.parallelism.tied_names(self.engine)
            state = with_tied_values(self.module, state, tied_names)
            state = shard_full_values(self.module, state)
            self.module.load_state_dict(state, strict=strict)
        else:
            self.parallelism.state.restore(self.engine, state)

    def train(self, mode: bool = True) -> WrappedModel:  # noqa: FBT001, FBT002 (torch's signature)
        """Set training mode. Updates the model and returns it, as torch does.

        Under DDP one rank may do it alone: replicas have equal buffers after each update. Where
        parameters are sharded, and with `forward_sync_buffers=False`, it is collective when
        training mode ends: all data ranks copy rank 0's buffers.
        """
        # Only where it changes: evaluating twice must not communicate, ranks may do it unequally.
        if self.module.training and not mode:
            self.parallelism.sync_buffers(self.engine, self.ctx)
        self.module.train(mode)
        return self

    def eval(self) -> WrappedModel:
        """Set evaluation mode: `train(False)`."""
        return self.train(False)

    def __deepcopy__(self, memo: dict[int, object]) -> NoReturn:
        # A copy of the engine would communicate over the groups of this one.
        raise ModelError(
            "a wrapped model cannot be copied with `copy.deepcopy`",
            got=f"a wrapped {type(self.module).__name__}",
            fix="copy the module before `faccel.wrap`; or copy values, as in "
            "`{name: x.clone() for name, x in model.state_dict().items()}`, which "
            "`model.load_state_dict` takes; for a moving average write "
            "`ema = faccel.parallel.init_ema(model, ctx)`",
        )

    # Hidden from type checkers, which would accept every misspelled attribute.
    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> object:
            # `module` is missing while `copy` and `pickle` build a record: do not recurse then.
            if name.startswith("__") or name == "module":
                raise AttributeError(name)
            return getattr(self.module, name)


@effectful(updates("model"), COLLECTIVE)
def wrap(
    model: nn.Module,
    ctx: DistContext,
    *,
    plan: Plan | None = None,
    device_placement: bool | None = None,
) -> WrappedModel:
    """Return `model` as it runs on the ranks of the mesh.

    Effects: updates model, collective. Moves it to `ctx.device` (unless `device_placement` is off),
    copies rank 0's parameters and buffers to every data rank, and applies a `mixed_precision` that
    changes modules: fp8, bf16-true or fp16-true.

    Gradients are averaged over the data ranks in backward. Any number of models can be wrapped.

    Args:
        model: The user's module; `unwrap` returns it.
        ctx: The context.
        plan: How the model is run; None is the `plan` of the configuration, else `Plan()`.
        device_placement: Whether to move the model to `ctx.device`; None takes the configuration's.
            False keeps a model where it is that is on its device already, or on several.

    Returns:
        A callable record.

    Raises:
        ModelError: `model` is not a module, is wrapped already, contains a wrapped model, or has no
            parameters or lazy ones.
        ConfigError: `plan` is not a `Plan`, or contradicts `--plan` of the launcher. Or
            `device_placement=False` on a mesh that shards parameters.

    Examples:
        >>> from faccel.testing import fake_context
        >>> net = wrap(torch.nn.Linear(2, 1), fake_context(0, 1))
        >>> net(torch.zeros(3, 2)).shape, sorted(net.state_dict())
        (torch.Size([3, 1]), ['bias', 'weight'])
    """
    if isinstance(model, WrappedModel):
        raise ModelError(
            "`model` is wrapped already",
            got=short_repr(model),
            fix="use the `WrappedModel` you have",
        )
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ModelError(
            "`model` must be a `torch.nn.Module`",
            got=shown(model),
            fix="write `faccel.wrap(model, ctx)`",
        )
    if next(model.parameters(), None) is None:
        raise ModelError(
            "`model` has no parameters",
            got=f"a {type(model).__name__}",
            fix="call it without `wrap`: it has nothing to train",
        )
    module_checks.check_contains_no_model(model, WrappedModel)
    module_checks.check_is_initialized(model)
    plan = _plan_for(plan, ctx.config)
    module_checks.check_wrapped_once(model, ctx)
    if ctx.config.debug:
        note_optimizers(model)
    places = _places(ctx, device_placement=device_placement)
    module_checks.check_holds_its_values(model, moves=places)
    ctx.comm.begin_call("wrap")
    cast_module(model, ctx)
    # A model on `meta` gets its memory from the strategy, in shards.
    if places and not module_checks.has_meta(model):
        move_module(model, ctx.device)
    engine, run = ctx.parallelism.wrap(model, plan, ctx)
    if ctx.config.debug and ctx.data_world_size > 1:
        from faccel.training.input_check import with_compared_inputs

        run = with_compared_inputs(run, ctx)
    ctx.comm.name_model(model)
    return registered(WrappedModel(model, engine, ctx.parallelism, ctx, run, plan, places))


def _places(ctx: DistContext, *, device_placement: bool | None) -> bool:
    """Return whether a model is moved to the device of the context."""
    if device_placement is None:
        return ctx.config.device_placement
    # Shards get their memory on the device of the mesh, wherever the module is.
    if not device_placement and not ctx.is_replicated:
        raise ConfigError(
            "`device_placement=False` keeps a model where it is, and this mesh shards parameters",
            got=str(ctx.mesh.spec),
            fix='leave `device_placement` out, or write `faccel.init(mesh="dp_replicate=-1")`',
        )
    return device_placement


def _plan_for(plan: Plan | None, config: Config) -> Plan:
    """Return the plan of a model: the argument of `wrap`, else that of the configuration."""
    # Imported here, because the records of a plan are a tenth of `import faccel`.
    from faccel.plan import Plan

    if plan is None:
        plan = config.plan or Plan()
    else:
        fix = "write `plan=faccel.Plan()`, with the options as arguments"
        instance_of("plan", plan, Plan, fix=fix)
        _check_agreement("plan", config.plan, plan, config)
    # The configuration completes a plan that compiles nothing.
    if config.compile is None:
        return plan
    if plan.compile is None:
        return attrs.evolve(plan, compile=config.compile)
    _check_agreement("compile", config.compile, plan.compile, config)
    return plan


def _check_agreement(name: str, flag: object, argument: object, config: Config) -> None:
    """Raise if the launcher has another value; neither wins, as for all fields."""
    if argument == flag or not config.sources.get(name, "").startswith("flag"):
        return
    raise ConfigError(
        f"the script and the launcher contradict each other about `{name}`",
        got=f"flag --{name} {text_of(flag)}, argument {text_of(argument)}",
        fix=f"leave out `--{name}`, or remove `{name}` from the plan of `faccel.wrap`",
    )


def registered(model: WrappedModel) -> WrappedModel:
    """Register the model in the lifetime of its context, for backward and the optimizer step."""
    reducer = model.parallelism.grad_reducer(model.module, model.engine)
    model.ctx.lifetime.add_model(model, reducer)
    return model


def unwrap(model: WrappedModel) -> nn.Module:
    """Return the user's module; it and `model` have the same parameters.

    Effects: pure.

    Raises:
        ModelError: `model` is not wrapped.

    Examples:
        >>> from faccel.testing import fake_context
        >>> net = torch.nn.Linear(2, 1)
        >>> unwrap(wrap(net, fake_context(0, 1))) is net
        True
    """
    check_wrapped(model)
    return model.module


def check_wrapped(model: object) -> None:
    """Raise unless `model` is a `WrappedModel`.

    Raises:
        ModelError: It is not.
    """
    fix = "write `model = faccel.wrap(net, ctx)` first"
    instance_of("model", model, WrappedModel, fix=fix, error=ModelError)


@effectful(updates("model"))
def grad_sync(model: WrappedModel, *, on: bool) -> AbstractContextManager[None]:
    """Return a context in which backward reduces gradients over the data ranks, or accumulates.

    Effects: updates model. Leaving the context restores the previous setting.

    Args:
        model: From `wrap`. Run both forward and backward inside.
        on: True reduces, False only accumulates. `MicroBatch.sync` is True for the last
            micro-batch of a window.

    Raises:
        ModelError: `model` is not wrapped.

    Examples:
        >>> from faccel.testing import fake_context
        >>> model = wrap(torch.nn.Linear(2, 1), fake_context(0, 1))
        >>> with grad_sync(model, on=False):
        ...     model(torch.zeros(3, 2)).sum().backward()
    """
    check_wrapped(model)
    return model.parallelism.grad_sync(model.engine, on=on)


def check_context(model: WrappedModel, ctx: DistContext) -> None:
    """Raise unless `ctx` is the context that `model` was wrapped with.

    Raises:
        ModelError: It is another one.
    """
    # The identity first: it is the ordinary case, and costs nothing.
    if ctx is not model.ctx and not is_same_world(ctx, model.ctx):
        raise ModelError(
            "`ctx` is not the context that `model` was wrapped with",
            got=f"{describe_context(ctx)}, for a model of {describe_context(model.ctx)}",
            fix="pass the `ctx` that you passed to `faccel.wrap`",
        )


def is_same_world(ctx: DistContext, other: DistContext) -> bool:
    """Return whether two contexts are records of one world with one parallelism.

    Effects: pure.
    """
    # `attrs.evolve(ctx, config=...)` makes another record of the same world.
    return ctx.comm is other.comm and ctx.parallelism is other.parallelism


def describe_context(ctx: DistContext) -> str:
    """Return rank and strategy of a context, for messages.

    Effects: pure.
    """
    return f"rank {ctx.rank} of {ctx.world_size} ({ctx.parallelism.name})"
