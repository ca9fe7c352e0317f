"""What the stages of a step know of the world: how to communicate, and how a model is run in parallel."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import attrs
import torch

from faccel.errors import ConfigError
from faccel.plan import Plan
from faccel.tree import Tree

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup  # noqa: TID251 (a name for the type checker)

DATA = "data"
WORLD = "world"


class Collectives(Protocol):
    """Communication between the ranks of an axis (`"data"`, `"world"` or an axis of the mesh).

    Tensors in are contiguous and on the device of the context; they are never written. Tensors out are fresh.
    `all_reduce` to `barrier` are collective over the axis.
    """

    def size(self, axis: str) -> int:
        """Return how many ranks the axis has."""
        ...

    def rank(self, axis: str) -> int:
        """Return where this rank stands on the axis."""
        ...

    def group(self, axis: str) -> ProcessGroup | None:
        """Return torch's process group of the axis, for engines that ask for one; None where there is none."""
        ...

    def announce(self, call: str, x: Tree) -> None:
        """Say for which call of the user's, on which value, the next collective is; debug mode compares it."""
        ...

    def failure(self, error: RuntimeError, doing: str, axis: str) -> Exception | None:
        """Return the error to raise, which names ranks, for one that communication ended in; None for any other."""
        ...

    def all_reduce(self, x: torch.Tensor, op: str, axis: str) -> torch.Tensor:
        """Return `T[...]`: the `op` (`"sum"`, `"min"`, `"max"`, `"prod"`) of every rank's `x: T[...]`."""
        ...

    def all_gather(self, x: torch.Tensor, axis: str) -> torch.Tensor:
        """Return `T[size, ...]` from every rank's `x: T[...]` of one shape and dtype."""
        ...

    def broadcast(self, x: torch.Tensor, src: int, axis: str) -> torch.Tensor:
        """Return the `x: T[...]` of rank `src` of the axis; the others' `x` gives shape and dtype."""
        ...

    def all_to_all(self, x: torch.Tensor, axis: str) -> torch.Tensor:
        """Return `T[size, ...]`: row `r` is what rank `r` had in the row of this rank."""
        ...

    def scatter(
        self, rows: torch.Tensor | None, like: torch.Tensor, src: int, axis: str
    ) -> torch.Tensor:
        """Return this rank's row of rank `src`'s `rows: T[size, ...]` (None elsewhere), a tensor as `like: T[...]`."""
        ...

    def barrier(self, axis: str) -> None:
        """Return when every rank of the axis has called it."""
        ...


Run = Callable[..., Any]
"""`run(method, *args, **kwargs)`: calls a method of the model with the strategy's hooks and precision."""


def no_join(engine: torch.nn.Module, states: Sequence[Any], ctx: Any) -> NoReturn:
    """Refuse to train on uneven inputs: what `Parallelism.join` is where a strategy cannot."""
    raise ConfigError(
        "ranks can only end at different updates where they are replicas",
        got=str(ctx.mesh.spec),
        fix='train on a loader with `tail="pad"` or `tail="drop"`',
    )


_Loss = Callable[[Callable[..., Any]], torch.Tensor]


@attrs.frozen(eq=False)
class StateIO:
    """How the state of a model leaves an engine that keeps parameters elsewhere than in the module, and comes back.

    Args:
        export: `export(engine)`: parameters and buffers under the user's names; of what is spread over ranks this
            rank's part, where it is, so that writing into it is writing into the model.
        restore: `restore(engine, state)`: takes what `export` gave, with other values, or tensors that are whole.
            Updates `engine`; collective.
    """

    export: Callable[[Any], dict[str, Any]]
    restore: Callable[[Any, Mapping[str, Any]], None]


@attrs.frozen
class Limits:
    """What `optimizer_step` asks of an update.

    Args:
        norm: The largest 2-norm of all gradients; None leaves them unmeasured.
        value: The largest magnitude of an element.
        scale: What the gradients were multiplied by.
        skip_nonfinite: Whether an update with a gradient that is not finite is left out.
    """

    norm: float | None
    value: float | None
    scale: float
    skip_nonfinite: bool


@attrs.frozen(eq=False)
class Parallelism:
    """One way to run a model on the ranks of a mesh, as a value.

    Args:
        name: For people.
        wrap: `wrap(module, plan, ctx) -> (engine, run)`. Updates `module` (placement, rank 0's values); collective.
        wrap_optimizer: `wrap_optimizer(opt, engine, ctx) -> Optimizer`. The same object where nothing is to be tied.
        sync: `sync(engine, on)`: a context in which gradients are reduced in this backward (`on`), or not yet.
        settle: `settle(engine, ctx)`: training pauses; makes what may differ between data ranks the same. Updates
            `engine`; collective.
        join: `join(engine, states, ctx)`: a context that ranks may leave after different numbers of updates. Updates
            `engine` and `states` (objects with `state_dict`), which are the same on all data ranks afterwards;
            collective.
        run_window: `run_window(engine, losses, factors, ctx) -> T[n]`: forward and backward of all micro-batches of a
            window together, where the strategy does not take them one by one; `losses` are functions from a callable
            model to a loss, one for each, `factors` what each is multiplied by for backward. Updates `.grad`;
            collective.
        state: How models are saved and loaded; None where the module itself holds everything.
        update: `update(opt, limits, ctx) -> (norm, finite)`: clips, steps and forgets the gradients of an optimizer
            whose engine does that itself; None where they are in `.grad`. Updates `opt`; collective.
        is_whole: Whether every rank of a mesh of replicas has whole models and gradients.
    """

    name: str
    wrap: Callable[[torch.nn.Module, Plan, Any], tuple[torch.nn.Module, Run]]
    wrap_optimizer: Callable[[torch.optim.Optimizer, torch.nn.Module, Any], torch.optim.Optimizer]
    sync: Callable[[torch.nn.Module, bool], AbstractContextManager[None]]
    settle: Callable[[torch.nn.Module, Any], None]
    join: Callable[[torch.nn.Module, Sequence[Any], Any], AbstractContextManager[None]] = no_join
    run_window: Callable[[Any, Sequence[_Loss], Sequence[Any], Any], torch.Tensor] | None = None
    state: StateIO | None = None
    update: (
        Callable[[torch.optim.Optimizer, Limits, Any], tuple[torch.Tensor | None, bool]] | None
    ) = None
    is_whole: bool = True
