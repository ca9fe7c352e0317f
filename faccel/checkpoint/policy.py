"""When to save and which checkpoints to keep, as pure predicates that combine with `|` and `&`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import attrs

from faccel.checkpoint.manifest import Checkpoint
from faccel.errors import ConfigError


@attrs.frozen
class SaveEvent:
    """What a `SavePolicy` looks at; the caller counts.

    Args:
        step: The step that has ended.
        seconds_since_save: Since the last checkpoint. Ranks measure differently: decide with `agree`.
        metric: The metric of now, None where none was measured.
        best: The best that was saved so far, None where none was.
        preempted: Whether the run is to end.
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

    def __call__(self, moment: SaveEvent) -> bool:
        return self.is_due(moment)

    def __or__(self, other: SavePolicy) -> SavePolicy:
        return SavePolicy(lambda moment: self(moment) or other(moment))

    def __and__(self, other: SavePolicy) -> SavePolicy:
        return SavePolicy(lambda moment: self(moment) and other(moment))


def every_steps(n: int) -> SavePolicy:
    """Save at every `n`-th step.

    Effects: pure.

    Examples:
        >>> [step for step in range(1, 8) if every_steps(3)(SaveEvent(step))]
        [3, 6]
    """
    _check_positive("every_steps", n, int)
    return SavePolicy(lambda moment: moment.step % n == 0)


def every_seconds(t: float) -> SavePolicy:
    """Save where the last checkpoint is at least `t` seconds old.

    Effects: pure.

    Examples:
        >>> every_seconds(600)(SaveEvent(step=1, seconds_since_save=601))
        True
    """
    _check_positive("every_seconds", t)
    return SavePolicy(lambda moment: moment.seconds_since_save >= t)


def at_best(*, mode: str = "max") -> SavePolicy:
    """Save where the metric is better than the best so far.

    Effects: pure.

    Args:
        mode: `"max"` where more is better, else `"min"`.

    Examples:
        >>> at_best()(SaveEvent(step=1, metric=0.9, best=0.8)), at_best(mode="min")(SaveEvent(step=1, metric=0.9, best=0.8))
        (True, False)
    """
    sign = _sign(mode)

    def is_best(moment: SaveEvent) -> bool:
        return moment.metric is not None and (
            moment.best is None or sign * moment.metric > sign * moment.best
        )

    return SavePolicy(is_best)


def on_preemption() -> SavePolicy:
    """Save where the run is to end.

    Effects: pure.

    Examples:
        >>> on_preemption()(SaveEvent(step=1, preempted=True))
        True
    """
    return SavePolicy(lambda moment: moment.preempted)


@attrs.frozen
class KeepPolicy:
    """Which of the committed checkpoints stay. `|` keeps what either keeps, `&` what both do; the newest always stays.

    Args:
        choose: Returns the steps that stay of checkpoints given newest first.

    Examples:
        >>> found = [Checkpoint("", step, metadata={"loss": step % 4}) for step in (7, 6, 5, 4, 3)]
        >>> sorted((keep_latest(1) | keep_best(1, "loss", mode="min"))(found))
        [4, 7]
    """

    choose: Callable[[Sequence[Checkpoint]], frozenset[int]]

    def __call__(self, found: Sequence[Checkpoint]) -> frozenset[int]:
        """Return the steps that stay of checkpoints given newest first."""
        return self.choose(found) | {each.step for each in found[:1]}

    def __or__(self, other: KeepPolicy) -> KeepPolicy:
        return KeepPolicy(lambda found: self.choose(found) | other.choose(found))

    def __and__(self, other: KeepPolicy) -> KeepPolicy:
        return KeepPolicy(lambda found: self.choose(found) & other.choose(found))


def keep_latest(n: int) -> KeepPolicy:
    """Keep the `n` newest.

    Effects: pure.

    Examples:
        >>> sorted(keep_latest(2)([Checkpoint("", step) for step in (3, 2, 1)]))
        [2, 3]
    """
    _check_positive("keep_latest", n, int)
    return KeepPolicy(lambda found: frozenset(each.step for each in found[:n]))


def keep_best(n: int, metric: str, *, mode: str = "max") -> KeepPolicy:
    """Keep the `n` best by a number in `Checkpoint.metadata`; one without it is worse than any with it.

    Effects: pure.

    Args:
        n: How many.
        metric: Its key in the `metadata` that `save` was given.
        mode: `"max"` where more is better, else `"min"`.

    Examples:
        >>> found = [Checkpoint("", s, metadata={"accuracy": a}) for s, a in ((3, 0.1), (2, 0.9), (1, 0.5))]
        >>> sorted(keep_best(1, "accuracy")(found))
        [2, 3]
    """
    _check_positive("keep_best", n, int)
    sign = _sign(mode)

    def choose(found: Sequence[Checkpoint]) -> frozenset[int]:
        measured = [each for each in found if isinstance(each.metadata.get(metric), (int, float))]
        ranked = sorted(measured, key=lambda each: -sign * each.metadata[metric])
        return frozenset(each.step for each in ranked[:n])

    return KeepPolicy(choose)


def keep_every(n: int) -> KeepPolicy:
    """Keep those of every `n`-th step.

    Effects: pure.

    Examples:
        >>> sorted(keep_every(10)([Checkpoint("", step) for step in (25, 20, 15, 10)]))
        [10, 20, 25]
    """
    _check_positive("keep_every", n, int)
    return KeepPolicy(lambda found: frozenset(each.step for each in found if each.step % n == 0))


def keep_policy(keep: Any) -> KeepPolicy | None:
    """Return the policy that `save` was given: a number keeps so many, None keeps all.

    Effects: pure.
    """
    if keep is None or isinstance(keep, KeepPolicy):
        return keep
    if isinstance(keep, int) and not isinstance(keep, bool):
        return keep_latest(keep)
    raise ConfigError(
        "`keep` is a number, a policy or None",
        got=repr(keep),
        fix="write `keep=faccel.checkpoint.keep_latest(3)`",
    )


def _check_positive(name: str, n: Any, kind: type = float) -> None:
    if isinstance(n, bool) or not isinstance(n, (int, kind)) or n <= 0:
        raise ConfigError(
            f"`{name}` takes a positive number", got=repr(n), fix=f"write `faccel.{name}(1)`"
        )


def _sign(mode: str) -> int:
    if mode not in ("max", "min"):
        raise ConfigError(
            "`mode` says what is better", got=repr(mode), fix='use `"max"` or `"min"`'
        )
    return 1 if mode == "max" else -1
