"""When to save and which checkpoints to keep: pure predicates that combine with `|` and `&`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import attrs

from faccel.checkpoint.manifest import Checkpoint
from faccel.checks import instance_of, one_of, positive
from faccel.errors import ConfigError, short_repr


@attrs.frozen
class SaveEvent:
    """The situation in which a `SavePolicy` decides; the training loop builds one after each step.

    Args:
        step: The step that has just ended.
        seconds_since_save: Time since the last checkpoint. It differs between ranks: decide with
            `agree`.
        metric: The current metric; None if there is none.
        best: The best metric saved so far; None if there is none.
        preempted: Whether the run is about to end.
    """

    step: int
    seconds_since_save: float = 0.0
    metric: float | None = None
    best: float | None = None
    preempted: bool = False


@attrs.frozen
class SavePolicy:
    """Whether to save at a `SaveEvent`. `|` and `&` combine policies.

    Args:
        is_due: The predicate.

    Examples:
        >>> due = every_steps(100) | on_preemption()
        >>> due(SaveEvent(step=100)), due(SaveEvent(step=7)), due(SaveEvent(step=7, preempted=True))
        (True, False, True)
    """

    is_due: Callable[[SaveEvent], bool]

    # Policies are values, so a combination is a new policy and its operands can be used again.
    def __call__(self, event: SaveEvent) -> bool:
        return self.is_due(event)

    def __or__(self, other: SavePolicy) -> SavePolicy:
        return SavePolicy(lambda event: self(event) or other(event))

    def __and__(self, other: SavePolicy) -> SavePolicy:
        return SavePolicy(lambda event: self(event) and other(event))


def every_steps(n: int) -> SavePolicy:
    """Save at every `n`-th step.

    Effects: pure.

    Examples:
        >>> [step for step in range(1, 8) if every_steps(3)(SaveEvent(step))]
        [3, 6]
    """
    _check_count(n, "faccel.checkpoint.every_steps(100)")
    return SavePolicy(lambda event: event.step % n == 0)


def every_seconds(t: float) -> SavePolicy:
    """Save when the last checkpoint is at least `t` seconds old.

    Effects: pure.

    Examples:
        >>> every_seconds(600)(SaveEvent(step=1, seconds_since_save=601))
        True
    """
    instance_of("t", t, (int, float), fix="write `faccel.checkpoint.every_seconds(600)`")
    positive("t", t)
    return SavePolicy(lambda event: event.seconds_since_save >= t)


def at_best(*, mode: str = "max") -> SavePolicy:
    """Save when the metric is better than the best so far.

    Effects: pure.

    Args:
        mode: `"max"` if larger is better, `"min"` if smaller is.

    Examples:
        >>> at_best()(SaveEvent(step=1, metric=0.9, best=0.8))
        True
        >>> at_best(mode="min")(SaveEvent(step=1, metric=0.9, best=0.8))
        False
    """
    sign = _sign(mode)

    def is_best(event: SaveEvent) -> bool:
        if event.metric is None:  # not measured at this step
            return False
        return event.best is None or sign * event.metric > sign * event.best

    return SavePolicy(is_best)


def on_preemption() -> SavePolicy:
    """Save when the run is about to end.

    Effects: pure.

    Examples:
        >>> on_preemption()(SaveEvent(step=1, preempted=True))
        True
    """
    return SavePolicy(lambda event: event.preempted)


@attrs.frozen
class KeepPolicy:
    """Which committed checkpoints to keep. `|` keeps what either policy keeps, `&` what both keep.

    The newest is always kept.

    Args:
        choose: Returns the steps to keep from checkpoints, newest first.

    Examples:
        >>> steps = (7, 6, 5, 4, 3)
        >>> existing = [Checkpoint("", step, metadata={"loss": step % 4}) for step in steps]
        >>> sorted((keep_latest(1) | keep_best(1, "loss", mode="min"))(existing))
        [4, 7]
    """

    choose: Callable[[Sequence[Checkpoint]], frozenset[int]]

    def __call__(self, checkpoints: Sequence[Checkpoint]) -> frozenset[int]:
        """Return the steps to keep from checkpoints, newest first."""
        # The newest stays even if a policy is wrong: it may be the only one of the run's progress.
        return self.choose(checkpoints) | _steps(checkpoints[:1])

    def __or__(self, other: KeepPolicy) -> KeepPolicy:
        return KeepPolicy(lambda checkpoints: self.choose(checkpoints) | other.choose(checkpoints))

    def __and__(self, other: KeepPolicy) -> KeepPolicy:
        return KeepPolicy(lambda checkpoints: self.choose(checkpoints) & other.choose(checkpoints))


def _steps(checkpoints: Sequence[Checkpoint]) -> frozenset[int]:
    return frozenset(checkpoint.step for checkpoint in checkpoints)


def keep_latest(n: int) -> KeepPolicy:
    """Keep the `n` newest.

    Effects: pure.

    Examples:
        >>> sorted(keep_latest(2)([Checkpoint("", step) for step in (3, 2, 1)]))
        [2, 3]
    """
    _check_count(n, "faccel.checkpoint.keep_latest(3)")
    return KeepPolicy(lambda checkpoints: _steps(checkpoints[:n]))


def keep_best(n: int, metric: str, *, mode: str = "max") -> KeepPolicy:
    """Keep the `n` best by a number in `Checkpoint.metadata`.

    Effects: pure. A checkpoint without the number is worse than any with it.

    Args:
        n: How many to keep.
        metric: Key of the number in the `metadata` passed to `save`.
        mode: `"max"` if larger is better, `"min"` if smaller is.

    Examples:
        >>> first = Checkpoint("", 1, metadata={"accuracy": 0.9})
        >>> second = Checkpoint("", 2, metadata={"accuracy": 0.5})
        >>> sorted(keep_best(1, "accuracy")([Checkpoint("", 3), second, first]))
        [1, 3]
    """
    _check_count(n, 'faccel.checkpoint.keep_best(1, "accuracy")')
    sign = _sign(mode)

    def has_metric(checkpoint: Checkpoint) -> bool:
        return isinstance(checkpoint.metadata.get(metric), (int, float))

    def choose(checkpoints: Sequence[Checkpoint]) -> frozenset[int]:
        measured = [checkpoint for checkpoint in checkpoints if has_metric(checkpoint)]
        # `sorted` is stable, so the newest of equals comes first
        ranked = sorted(measured, key=lambda checkpoint: -sign * checkpoint.metadata[metric])
        return _steps(ranked[:n])

    return KeepPolicy(choose)


def keep_every(n: int) -> KeepPolicy:
    """Keep those of every `n`-th step.

    Effects: pure.

    Examples:
        >>> sorted(keep_every(10)([Checkpoint("", step) for step in (25, 20, 15, 10)]))
        [10, 20, 25]
    """
    _check_count(n, "faccel.checkpoint.keep_every(1000)")
    return KeepPolicy(
        lambda checkpoints: frozenset(step for step in _steps(checkpoints) if step % n == 0)
    )


def keep_policy(keep: object) -> KeepPolicy:
    """Return the policy for the argument `keep`: a number keeps that many, None keeps all.

    Effects: pure.

    Raises:
        ConfigError: It is something else.
    """
    if keep is None:
        return KeepPolicy(_steps)
    if isinstance(keep, KeepPolicy):
        return keep
    # `True` is an int in Python, but `keep=True` is a mistake
    if isinstance(keep, int) and not isinstance(keep, bool) and keep > 0:
        return keep_latest(keep)
    raise ConfigError(
        "`keep` must be a positive int, a KeepPolicy or None",
        got=short_repr(keep),
        fix="write `keep=3` or `keep=faccel.checkpoint.keep_best(1, 'accuracy')`",
    )


def _check_count(n: object, call: str) -> None:
    """Raise unless `n` is a positive int; `call` is an example with a valid one."""
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise ConfigError("`n` must be a positive int", got=short_repr(n), fix=f"write `{call}`")


def _sign(mode: str) -> int:
    one_of("mode", mode, ("max", "min"))
    if mode == "max":
        return 1
    return -1
