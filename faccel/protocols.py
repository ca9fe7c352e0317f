"""The interfaces of communication, and of the ways to run a model in parallel."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Never, NoReturn, Protocol

import attrs
import torch
from torch import nn

from faccel.errors import ConfigError
from faccel.grad_reducer import GradReducer, OwnedParams
from faccel.lifetime import WaitTimes
from faccel.tree import Tree
from faccel.update_options import UpdateOptions

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup  # noqa: TID251 (a name for the type checker)

    from faccel.context import DistContext  # the context holds these records, not the reverse
    from faccel.plan import Plan


class Turn(Protocol):
    """Ranks that wait while others work alone, however long that takes."""

    def working(self) -> AbstractContextManager[None]:
        """Run the body of a rank that goes first, while the others can see that it is alive."""
        ...

    def wait(self, *, went_first: bool) -> None:
        """Return when the body has ended on all ranks that go first.

        Raises:
            RankFailedError: One of them has failed.
        """
        ...


class Counter(Protocol):
    """Gives each number from 0 to one rank of the world."""

    def next(self) -> int:
        """Return the smallest number that no rank has got yet."""
        ...


class Recovery(Protocol):
    """Lets the ranks of a world leave their collectives after a failure, and communicate again.

    Attributes:
        is_active: Whether the ranks will agree on a failure. Errors of collectives then do not
            look for the rank that caused them.
    """

    is_active: bool

    def interrupt(self) -> None:
        """End the collectives of this rank and of the ranks that wait for it: they raise."""
        ...

    def exchange(self, report: str) -> list[str | None]:
        """Return the report of each rank, the same list on all ranks.

        A rank calls it after `interrupt`. None for a rank that has ended, or that does not call it
        within a tenth of the timeout of the context.
        """
        ...

    def renew(self) -> bool:
        """Let the ranks communicate again; return whether they can. Collective.

        Call it if every rank has reported.
        """
        ...


class Collectives(Protocol):
    """Communication between the ranks of an axis: `"data"`, `"world"` or an axis of the mesh.

    Arguments are contiguous tensors on the device of the context, and are never written. Results
    are fresh tensors. `all_reduce` to `barrier` are collective over the axis.
    """

    def size(self, axis: str) -> int:
        """Return the number of ranks of the axis."""
        ...

    def rank(self, axis: str) -> int:
        """Return the rank of this process on the axis."""
        ...

    def group(self, axis: str) -> ProcessGroup | None:
        """Return torch's process group of the axis, or None where the axis has none."""
        ...

    @property
    def recovery(self) -> Recovery | None:
        """How the ranks continue after a failure of one; None where they cannot."""
        ...

    # Not an argument of each collective, because only debug mode uses it.
    def set_call_label(self, call: str, x: Tree) -> None:
        """Label the next collective with the public call and its value, for debug mode."""
        ...

    def name_model(self, model: nn.Module) -> None:
        """Give the units of a model names, by which ranks compare what they communicate."""
        ...

    def count_waits(self, waits: WaitTimes) -> None:
        """Count the time of collectives on the host in `waits` from now on."""
        ...

    def begin_call(self, call: str) -> None:
        """Return when every rank of the world begins this call.

        For calls outside of the inner loop: it is a collective in addition to those of the call.

        Args:
            call: The name of the public function.

        Raises:
            DesyncError: A rank makes another call, or waits in a collective that this one has not
                begun.
            RankFailedError: A rank has left.
        """
        ...

    def as_rank_error(self, error: RuntimeError, doing: str, axis: str) -> Exception | None:
        """Return an error that names ranks if communication ended in `error`, else None."""
        ...

    def new_turn(self, *, local: bool, timeout_s: float) -> Turn:
        """Return the next turn of `main_first`: each rank of the world calls it where it begins."""
        ...

    def new_counter(self) -> Counter:
        """Return a counter from 0: each rank of the world calls it where it begins."""
        ...

    def all_reduce(self, x: torch.Tensor, op: str, axis: str) -> torch.Tensor:
        """Return `T[...]`: the `op` ("sum", "min", "max", "prod") over every rank's `x: T[...]`."""
        ...

    def all_gather(self, x: torch.Tensor, axis: str) -> torch.Tensor:
        """Return `T[size, ...]` from every rank's `x: T[...]` of one shape and dtype."""
        ...

    def broadcast(self, x: torch.Tensor, src: int, axis: str) -> torch.Tensor:
        """Return `x: T[...]` of rank `src`; on the other ranks `x` gives the shape and dtype."""
        ...

    def all_to_all(self, x: torch.Tensor, axis: str) -> torch.Tensor:
        """Return `T[size, ...]`: row `r` is the row that rank `r` has for this rank."""
        ...

    # `like`, because the ranks that receive have no row to take the shape and dtype from.
    def scatter(
        self, rows: torch.Tensor | None, like: torch.Tensor, src: int, axis: str
    ) -> torch.Tensor:
        """Return this rank's row of rank `src`'s `rows: T[size, ...]`; `rows` is None elsewhere.

        `like: T[...]` gives the shape and dtype of a row.
        """
        ...

    def barrier(self, axis: str) -> None:
        """Return after every rank of the axis has called it."""
        ...


class Stateful(Protocol):
    """An object with torch's pair of state methods, such as an optimizer or a scheduler."""

    def state_dict(self) -> dict[str, Tree]:
        """Return the state."""
        ...

    def load_state_dict(self, state_dict: dict[str, Tree]) -> object:
        """Restore the state in place."""
        ...


class RunMethod(Protocol):
    """Calls a method of the wrapped model with the strategy's hooks and precision."""

    def __call__(self, method: str, *args: Tree, **kwargs: Tree) -> Tree:
        """Call `method` with the user's arguments."""
        ...


class Wrap(Protocol):
    """Makes the engine that runs a module. Updates `module`; collective."""

    def __call__(
        self, module: torch.nn.Module, plan: Plan, ctx: DistContext
    ) -> tuple[torch.nn.Module, RunMethod]:
        """Place `module` on the ranks and return its engine, and the function that calls it."""
        ...


class WrapOptimizer(Protocol):
    """Connects an optimizer to an engine. Collective."""

    def __call__(
        self, opt: torch.optim.Optimizer, engine: torch.nn.Module, ctx: DistContext
    ) -> torch.optim.Optimizer:
        """Return the optimizer to step with: `opt` itself where the engine has no other."""
        ...


class GradSync(Protocol):
    """Turns the reduction of gradients in backward on or off."""

    def __call__(self, engine: torch.nn.Module, *, on: bool) -> AbstractContextManager[None]:
        """Return a context in which backward reduces gradients, or only accumulates them."""
        ...


class SyncBuffers(Protocol):
    """Makes buffers equal where they differ between data ranks. Updates `engine`; collective."""

    def __call__(self, engine: torch.nn.Module, ctx: DistContext) -> None:
        """Overwrite the buffers with those of one rank."""
        ...


class JoinUneven(Protocol):
    """Lets ranks leave training after different numbers of updates. Collective."""

    def __call__(
        self, engine: torch.nn.Module, states: Sequence[Stateful], ctx: DistContext
    ) -> AbstractContextManager[None]:
        """Return the context to train in, after which data ranks have equal models and `states`."""
        ...


MicroBatchLoss = Callable[[Callable[..., Tree]], torch.Tensor]
"""A function from a callable model to the scalar loss of one micro-batch."""


class PipelineForwardBackward(Protocol):
    """Runs forward and backward of all micro-batches of a window together.

    Updates `.grad`; collective.
    """

    def __call__(
        self,
        engine: torch.nn.Module,
        losses: Sequence[MicroBatchLoss],
        factors: Sequence[float | torch.Tensor],
        ctx: DistContext,
    ) -> torch.Tensor:
        """Return the losses `T[n]`; `factors[i]` multiplies loss `i` in backward."""
        ...


class EngineOptimizerStep(Protocol):
    """Clips, steps and clears the gradients of an optimizer through its engine.

    Updates `opt`; collective.
    """

    def __call__(
        self, opt: torch.optim.Optimizer, options: UpdateOptions, ctx: DistContext
    ) -> tuple[torch.Tensor | None, bool]:
        """Return the norm of the gradients (None without `clip_norm`), and whether it stepped."""
        ...


def no_join(engine: torch.nn.Module, states: Sequence[Stateful], ctx: DistContext) -> NoReturn:
    """Raise: `Parallelism.join` of a strategy that does not support uneven inputs."""
    raise ConfigError(
        "the mesh must have replicas only to train with `join`",
        got=str(ctx.mesh.spec),
        fix='train on a loader with `tail="pad"` or `tail="drop"`',
    )


class TiedCopies(Protocol):
    """Maps the `id` of each copy of a tied parameter to the name of the first, on another rank.

    A norm counts the first copy only, and a checkpoint stores state under its name.
    """

    def __call__(self, engine: torch.nn.Module) -> Mapping[int, str]: ...


class TiedNames(Protocol):
    """Maps the `id` of each parameter that other ranks have, too, to its names on all ranks."""

    def __call__(self, engine: torch.nn.Module) -> Mapping[int, Sequence[str]]: ...


def no_tied_copies(engine: torch.nn.Module) -> Mapping[int, Never]:
    """Return an empty mapping: the default of `tied_copies` and `tied_names`."""
    return {}


class LossRank(Protocol):
    """Returns which rank of a pipeline computes the losses."""

    def __call__(self, engine: torch.nn.Module) -> int: ...


def first_rank(engine: torch.nn.Module) -> int:
    """Return 0: `Parallelism.loss_rank` where the axis `pp` has one rank."""
    return 0


class MakeGradReducer(Protocol):
    """Returns what averages the gradients of a wrapped model."""

    def __call__(self, module: torch.nn.Module, engine: torch.nn.Module) -> GradReducer:
        """Return the reducer of the model that `engine` runs; `module` is the user's."""
        ...


def averages_all(module: torch.nn.Module, engine: torch.nn.Module) -> GradReducer:
    """Return a reducer of all parameters: the engine averages their gradients in backward."""
    return OwnedParams(module, frozenset(map(id, module.parameters())))


class Rewrap(Protocol):
    """Makes the engine again after the user changed the module. Collective."""

    def __call__(
        self,
        module: torch.nn.Module,
        engine: torch.nn.Module,
        plan: Plan,
        ctx: DistContext,
    ) -> tuple[torch.nn.Module, RunMethod]:
        """Return the new engine and the function that calls it; `engine` is not used again."""
        ...


def no_rewrap(
    module: torch.nn.Module, engine: torch.nn.Module, plan: Plan, ctx: DistContext
) -> NoReturn:
    """Raise: `Parallelism.rewrap` of a strategy that cannot change a module after `wrap`."""
    raise ConfigError(
        f"the strategy `{ctx.parallelism.name}` cannot change a model after `faccel.wrap`",
        got="`faccel.rewrap`",
        fix="change the model first, and then write `model = faccel.wrap(net, ctx)`",
    )


class Start(Protocol):
    """Creates what models need before they are built, such as process groups. Collective."""

    def __call__(self, ctx: DistContext) -> None:
        """Create it for the context that `init` is about to return."""
        ...


def starts_nothing(ctx: DistContext) -> None:
    """Do nothing: `Parallelism.start` of a strategy that needs nothing before `wrap`."""


class NamedParameters(Protocol):
    """Yields the parameters of an engine that gives them other names than the module does."""

    def __call__(self, engine: torch.nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield them under the names of `ExportState`."""
        ...


class ExportState(Protocol):
    """Reads the state of an engine."""

    def __call__(self, engine: torch.nn.Module) -> dict[str, Tree]:
        """Return parameters and buffers under the user's names, sharded ones as this rank's shard.

        Shards alias the engine's memory: writing into one writes into the model.
        """
        ...


class RestoreState(Protocol):
    """Writes the state of an engine. Updates `engine`; collective."""

    def __call__(self, engine: torch.nn.Module, state: Mapping[str, Tree]) -> None:
        """Restore what `ExportState` returned, or full tensors under the same names."""
        ...


@attrs.frozen(eq=False)
class StateIO:
    """How to save and load an engine whose parameters are not those of the user's module.

    Args:
        export: Reads the state.
        restore: Writes it back.
        named_parameters: Yields the parameters under the names of the state; None where they are
            those of the user's module.
    """

    export: ExportState
    restore: RestoreState
    named_parameters: NamedParameters | None = None


@attrs.frozen(eq=False)
class Parallelism:
    """One way to run a model on the ranks of a mesh, as a value.

    Args:
        name: The name of the strategy, for messages.
        wrap: Makes the engine of a module.
        wrap_optimizer: Connects an optimizer to the engine.
        grad_sync: Turns the reduction of gradients in backward on or off.
        sync_buffers: Makes buffers equal on all data ranks, when training mode ends.
        join: Lets ranks end at different updates; the default raises.
        pipeline_forward_backward: Runs all micro-batches of a window together; None where the
            strategy runs them one by one.
        loss_rank: Returns the rank of the axis `pp` that computes the losses.
        state: How the engine is saved and loaded; None where the user's module holds everything.
        optimizer_step: The engine's own step; None where gradients are in `.grad` and the
            optimizer is torch's.
        tied_copies: Lists copies of tied parameters, where ranks have different modules.
        tied_names: Lists all names of those parameters and of their first copies.
        is_replicated: Whether every rank of a mesh of replicas has full parameters and gradients.
        grad_reducer: Returns what averages the gradients of a model.
        rewrap: Makes the engine again after the module changed; the default raises.
        start: Creates what models need before they are built; `init` calls it last.
    """

    name: str
    wrap: Wrap
    wrap_optimizer: WrapOptimizer
    grad_sync: GradSync
    sync_buffers: SyncBuffers
    # Functions as defaults where a strategy can do without: a caller calls them without a check.
    join: JoinUneven = no_join
    pipeline_forward_backward: PipelineForwardBackward | None = None
    loss_rank: LossRank = first_rank
    # None instead: the caller then saves the user's module and steps PyTorch's optimizer.
    state: StateIO | None = None
    optimizer_step: EngineOptimizerStep | None = None
    tied_copies: TiedCopies = no_tied_copies
    tied_names: TiedNames = no_tied_copies
    is_replicated: bool = True
    grad_reducer: MakeGradReducer = averages_all
    rewrap: Rewrap = no_rewrap
    start: Start = starts_nothing
