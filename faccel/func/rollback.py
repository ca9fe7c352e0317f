"""A step that skips batches with a non-finite loss, and returns to an earlier state if needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import attrs
import torch

from faccel.checks import positive
from faccel.effects import COLLECTIVE, effectful
from faccel.func.spike import SpikeState, detect_spike
from faccel.func.train_state import TrainState, check_state
from faccel.func.train_step import Metrics, Step
from faccel.tree import Tree


@attrs.frozen(eq=False)
class History:
    """The last states of one training run, for `rollback`.

    Args:
        states: Oldest first; the last one is the current state.
        num_skipped: Number of batches that were skipped.
        is_in_doubt: Whether the last batch was skipped, so that the current state may be bad.
        spikes: Statistics of the losses, if loss spikes are skipped.
    """

    states: tuple[TrainState, ...]
    num_skipped: int = 0
    is_in_doubt: bool = False
    spikes: SpikeState | None = None

    @property
    def state(self) -> TrainState:
        """The current state."""
        return self.states[-1]


def is_nonfinite(metrics: Mapping[str, Tree]) -> bool:
    """Return whether the loss, or the norm of the gradients if measured, is not finite.

    Waits for the device.

    Effects: pure.

    Examples:
        >>> from faccel.func import is_nonfinite
        >>> is_nonfinite({"loss": torch.tensor(float("nan"))})
        True
    """
    # stacked, so that the host waits once
    checks = [metrics[name].isfinite() for name in ("loss", "grad_norm") if name in metrics]
    return not bool(torch.stack(checks).all())


@effectful(COLLECTIVE)
def rollback(
    step: Step,
    *,
    keep: int = 2,
    is_poisoned: Callable[[Metrics], bool] = is_nonfinite,
    spikes: SpikeState | None = None,
) -> Callable[[History | TrainState, Tree], tuple[Metrics, History]]:
    """Return the step that skips poisoned batches and stores the last states.

    After one poisoned batch the current state stays. After a second one in a row that state itself
    may be the cause, so the state before it becomes current, and so on, down to the oldest one.
    States are values: storing one costs the memory of its tensors and no copy.

    Effects: collective. The returned step has the effects of `step`. All ranks have the same
    metrics, so that they agree.

    Args:
        step: From `make_step`, `sam` or `dp_sgd`, without `donate`.
        keep: Number of states to store, the current one included.
        is_poisoned: Returns from the metrics of a step whether to skip its batch.
        spikes: From `init_spike`, to skip batches with a loss spike, too. The statistics continue
            in `history.spikes`; None detects none.

    Returns:
        `run(history, batch) -> (metrics, history)`. The first call takes a state instead of a
        history. `history.state` is the current state; `metrics["skipped"]` is true if the batch was
        skipped.

    Raises:
        ConfigError: `keep` is not positive.
        DonatedError: In the returned step: `step` donates.

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
    positive("keep", keep)

    def run(history: History | TrainState, batch: Tree) -> tuple[Metrics, History]:
        # The first call: nothing was skipped yet.
        if not isinstance(history, History):
            history = History((history,), spikes=spikes)
        metrics, new_state = step(history.state, batch)
        check_state(history.state)  # a donating step has overwritten it
        is_spike, new_spikes = False, history.spikes
        if new_spikes is not None:
            is_spike, new_spikes = detect_spike(new_spikes, metrics["loss"])
        if not is_spike and not is_poisoned(metrics):
            # Older states than `keep` are released here.
            states = (*history.states, new_state)[-keep:]
            return metrics, History(states, history.num_skipped, spikes=new_spikes)
        # The state before this step, unless it was already in doubt; the oldest one always stays.
        states = history.states
        if history.is_in_doubt and len(states) > 1:
            states = states[:-1]
        skipped = metrics["loss"].new_ones((), dtype=torch.bool)
        num_skipped = history.num_skipped + 1
        new_history = History(states, num_skipped, is_in_doubt=True, spikes=new_spikes)
        return {**metrics, "skipped": skipped}, new_history

    return run
