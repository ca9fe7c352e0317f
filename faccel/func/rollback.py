"""The last few states, kept by reference: a poisoned batch costs one step and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import attrs
import torch

from faccel.effects import COLLECTIVE, effectful
from faccel.errors import ConfigError
from faccel.func.train_state import TrainState, check_state
from faccel.func.train_step import Metrics, Step
from faccel.tree import Tree


@attrs.frozen(eq=False)
class History:
    """States of one run, for `rollback`.

    Args:
        states: The oldest first; the last one is to be gone on with.
        num_skipped: How many batches were left out.
        is_in_doubt: Whether the last batch was one of them.
    """

    states: tuple[TrainState, ...]
    num_skipped: int = 0
    is_in_doubt: bool = False

    @property
    def state(self) -> TrainState:
        """The state to go on with."""
        return self.states[-1]


def is_nonfinite(metrics: Mapping[str, Any]) -> bool:
    """Whether the loss, or the norm of the gradients where it was measured, is not finite. Waits for the device.

    Effects: pure.

    Examples:
        >>> from faccel.func import is_nonfinite
        >>> is_nonfinite({"loss": torch.tensor(float("nan"))})
        True
    """
    found = [metrics[name] for name in ("loss", "grad_norm") if name in metrics]
    return not bool(torch.stack([each.isfinite() for each in found]).all())


@effectful(COLLECTIVE)
def rollback(
    step: Step, *, keep: int = 2, is_poisoned: Callable[[Metrics], bool] = is_nonfinite
) -> Callable[[History | TrainState, Tree], tuple[Metrics, History]]:
    """Return the step that leaves a poisoned batch out and keeps the last states.

    After one poisoned batch the state from before it goes on. After a second one in a row that state itself is in
    doubt, and the one before it goes on, and so on, as far back as states are kept. States are values, so that keeping
    one costs the memory of its tensors and no copy.

    Effects: collective. What is returned is, as `step` is, which must not donate. All ranks have the same metrics, so
    that they agree.

    Args:
        step: From `make_step` and its like.
        keep: How many states are kept, the current one included.
        is_poisoned: What is asked of the metrics of a step.

    Returns:
        `run(history, batch) -> (metrics, history)`, which takes a state to begin with. `history.state` is the current
        state, `metrics["skipped"]` says that the batch was left out.

    Raises:
        ConfigError: `keep` is not positive.
        DonatedError: Later: the step donates.

    Examples:
        >>> from faccel.func import functional_call, init_state, make_step, rollback, sgd
        >>> from faccel.testing import fake_context
        >>> ctx, model = fake_context(0, 1), torch.nn.Linear(2, 1)
        >>> def loss_fn(params, batch, generator):
        ...     return functional_call(model, params, batch).square().mean()
        >>> run = rollback(make_step(loss_fn, sgd(0.1), ctx))
        >>> metrics, history = run(init_state(model, sgd(0.1), ctx, seed=0), torch.ones(4, 2))
        >>> metrics, history = run(history, torch.full((4, 2), float("nan")))
        >>> int(history.state.step), history.num_skipped
        (1, 1)
    """
    if keep < 1:
        raise ConfigError(
            "at least the current state is kept", got=f"keep={keep}", fix="use 1 or more"
        )

    def run(history: History | TrainState, batch: Tree) -> tuple[Metrics, History]:
        past = history if isinstance(history, History) else History((history,))
        metrics, new = step(past.state, batch)
        check_state(past.state)
        if not is_poisoned(metrics):
            return metrics, History((*past.states, new)[-keep:], past.num_skipped)
        back = past.states[:-1] if past.is_in_doubt and len(past.states) > 1 else past.states
        skipped = metrics["loss"].new_ones((), dtype=torch.bool)
        return {**metrics, "skipped": skipped}, History(
            back, past.num_skipped + 1, is_in_doubt=True
        )

    return run
