"""`share_work`: a rank that is done takes the next items, so that ranks end at the same time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from faccel.checks import integer, shown
from faccel.comm.all_or_error import all_or_error
from faccel.context import DistContext, require_context
from faccel.effects import COLLECTIVE, effectful
from faccel.errors import ConfigError, DataError, short_text
from faccel.tree import to_device

T = TypeVar("T")
R = TypeVar("R")


# Longest first is within 4/3 of the best schedule (Graham 1969), if each rank takes the next
# item when it is free.
@effectful(COLLECTIVE)
def share_work(
    fn: Callable[[Sequence[T]], Sequence[R]],
    items: Sequence[T],
    ctx: DistContext,
    *,
    batch_size: int = 1,
) -> list[R]:
    """Run `fn` on batches of items, each on the first rank that is free; return results in order.

    Effects: collective. Prompts of different length take different times: `faccel.split` would let
    ranks wait for the slowest one. Sort items by falling length to end together. In a simulation
    each rank gets every n-th batch.

    Args:
        fn: Returns one result for each item. It must not call collectives.
        items: All items, equal on every rank.
        ctx: A context whose ranks have full models.
        batch_size: Number of items for a call of `fn`.

    Returns:
        The results in the order of the items, on every rank; tensors are on the CPU.

    Raises:
        ConfigError: The mesh shards models: each forward then needs all ranks. Or `fn` is not a
            function, or `items` not a sequence.
        DataError: `fn` returned another number of results, or a mapping or a text. Or the number of
            items or `batch_size` differs between ranks.
        RankFailedError: `fn` raised on another rank.

    Examples:
        >>> from faccel.testing import simulate
        >>> double = lambda batch: [2 * x for x in batch]
        >>> simulate(lambda ctx: share_work(double, range(5), ctx, batch_size=2), 2)[1]
        [0, 2, 4, 6, 8]
    """
    require_context(ctx, "faccel.inference.share_work(fn, items, ctx)")
    integer("batch_size", batch_size, at_least=1)
    if not callable(fn):
        raise ConfigError(
            "`fn` must be a function", got=shown(fn), fix="write `share_work(fn, items, ctx)`"
        )
    is_sequence = hasattr(items, "__len__") and hasattr(items, "__getitem__")
    if not is_sequence or isinstance(items, Mapping):
        raise ConfigError("`items` must be a sequence", got=shown(items), fix="write `list(items)`")
    if not ctx.is_replicated:
        raise ConfigError(
            "`share_work` needs a full model on each rank",
            got=f"the mesh {ctx.mesh.spec}",
            fix='write `faccel.init(mesh="dp_replicate=-1")`, or `faccel.split(items, ctx)`',
        )
    ctx.comm.begin_call("share_work")
    # In the store of the world: a rank takes a number whenever it is free, without the others.
    counter = ctx.comm.new_counter()

    def run() -> tuple[int, int, dict[int, list[R]]]:
        results: dict[int, list[R]] = {}
        start = counter.next() * batch_size
        while start < len(items):
            batch = [items[index] for index in range(start, min(start + batch_size, len(items)))]
            results[start] = _checked(fn(batch), batch)
            start = counter.next() * batch_size
        return len(items), batch_size, to_device(results, "cpu")

    # Ranks that are done wait here, at most for one batch of another rank.
    by_start: dict[int, list[R]] = {}
    outcomes = all_or_error(run, ctx, "run `fn` on its items")
    _check_equal([(num_items, size) for num_items, size, _ in outcomes])
    for _, _, results in outcomes:
        by_start.update(results)
    return [result for start in sorted(by_start) for result in by_start[start]]


def _check_equal(sizes: Sequence[tuple[int, int]]) -> None:
    # A rank would skip items of another one, or return them twice.
    if len(set(sizes)) == 1:
        return
    texts: list[str] = []
    for rank, (num_items, batch_size) in enumerate(sizes):
        texts.append(f"rank {rank}: {num_items} items, batch_size={batch_size}")
    raise DataError(
        "`items` and `batch_size` differ between ranks",
        got=short_text("; ".join(texts)),
        fix="pass the same items on every rank, without `faccel.split`",
    )


def _checked(returned: Sequence[R], batch: Sequence[object]) -> list[R]:
    # The keys of a mapping and the characters of a text would be taken for results.
    if isinstance(returned, Mapping | str | bytes):
        raise DataError(
            "`fn` must return one result for each item",
            got=f"a {type(returned).__name__}",
            fix="return a list of `len(batch)` results",
        )
    results = list(returned)
    if len(results) != len(batch):
        raise DataError(
            "`fn` must return one result for each item",
            got=f"{len(results)} results for {len(batch)} items",
            fix="return a list of `len(batch)` results",
        )
    return results
