"""A step that is run twice from one state: hardware and kernels that compute two results raise."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import attrs
import torch
import xxhash

from faccel.comm.objects import gather_json
from faccel.comm.tensors import broadcast
from faccel.context import DistContext, require_context
from faccel.effects import COLLECTIVE, effectful
from faccel.errors import DesyncError, PurityError
from faccel.func.train_state import TrainState, check_state, state_to_dict
from faccel.func.train_step import Metrics, Step
from faccel.mesh import DATA
from faccel.training.tensor_hash import hash_tensor, mix_
from faccel.tree import Tree, flatten, paths

Leaves = dict[str, torch.Tensor]
"""The tensors of the result of a step, by path."""

# An integer type for each size of an element.
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_FIX = (
    "call `torch.use_deterministic_algorithms(True)` before the step, which raises for a kernel "
    "that is not deterministic; if it raises nothing, test the device of that rank"
)


@effectful(COLLECTIVE)
def replay(
    step: Step,
    state: TrainState,
    batch: Tree,
    ctx: DistContext,
    *,
    generator: torch.Generator | None = None,
) -> tuple[Metrics, TrainState]:
    """Run a step twice from the same state, and raise if the results differ in a bit.

    Where the state is replicated, results of the ranks are compared, too. All ranks raise together.

    Effects: collective. It has the effects of `step`, too. One more all-reduce, of three numbers,
    for which the host waits. It takes the time of two steps and the memory of two more states.

    Args:
        step: From `make_step`, `ensemble`, `sam`, `dp_sgd` or `compiled`; with `donate`, too.
        state: The state to start from.
        batch: The batch of this rank.
        ctx: The context of the step.
        generator: As in the step. It advances as in one call.

    Returns:
        The metrics and the new state, as `step(state, batch)` returns them.

    Raises:
        PurityError: The two runs differ on a rank. Names the first leaf, the ranks, the number of
            elements that differ and the largest difference.
        DesyncError: Both runs are equal on each rank, but the ranks differ.

    Examples:
        >>> from faccel.func import functional_call, init_state, make_step, replay, sgd
        >>> from faccel.testing import fake_context
        >>> ctx, model = fake_context(0, 1), torch.nn.Linear(2, 1)
        >>> def loss_fn(params, batch, generator):
        ...     return functional_call(model, params, batch).square().mean()
        >>> state = init_state(model, sgd(0.1), ctx, seed=0)
        >>> metrics, state = replay(make_step(loss_fn, sgd(0.1), ctx), state, torch.ones(4, 2), ctx)
        >>> int(state.step)
        1
    """
    require_context(ctx, "faccel.func.replay(step, state, batch, ctx)")
    check_state(state)
    if generator is None:
        # A step that donates overwrites the state that it gets.
        first = step(_copy_of(state), batch)
        second = step(state, batch)
    else:
        before = generator.get_state()
        first = step(_copy_of(state), batch, generator)
        generator.set_state(before)
        second = step(state, batch, generator)
    _check_equal(_leaves(*first), _leaves(*second), ctx)
    return second


def _copy_of(state: TrainState) -> TrainState:
    return attrs.evolve(
        state,
        params=state.params.clone(),
        buffers=state.buffers.clone(),
        opt=state.opt.clone(),
        step=state.step.clone(),
        seed=state.seed.clone(),
    )


def _leaves(metrics: Metrics, state: TrainState) -> Leaves:
    """Return the tensors of a result: the metrics first, then the state."""
    leaves: Leaves = {}
    for name, tree in (("metrics", metrics), ("state", state_to_dict(state))):
        for path, leaf in zip(paths(tree, name), flatten(tree)[0], strict=True):
            if isinstance(leaf, torch.Tensor):
                leaves[path] = leaf.detach()
    return leaves


def _check_equal(first: Leaves, second: Leaves, ctx: DistContext) -> None:
    """Raise on all ranks if two runs differ on one, or the results of two ranks. Collective."""
    hashes = _hashes(second, ctx)
    differs = torch.ones((), dtype=torch.bool, device=ctx.device)
    if first.keys() == second.keys():
        differs = (_hashes(first, ctx) != hashes).any()
    is_replicated = [_is_replicated(path) for path in second]
    total = (hashes * torch.tensor(is_replicated, device=ctx.device)).sum()
    # max(x) == -1 - max(-1 - x) where all ranks have the same x; `~x` is -1 - x.
    flags = torch.stack([differs.long(), total, ~total])
    ctx.comm.set_call_label("replay", flags)
    num_different, high, low = ctx.comm.all_reduce(flags, "max", DATA).tolist()
    if num_different:
        _raise_not_repeatable(first, second, ctx)
    if high != -1 - low:
        _raise_different_ranks(second, hashes.tolist(), ctx)


def _is_replicated(path: str) -> bool:
    """Return whether all ranks have the same leaf: `aux` belongs to the rows of this rank."""
    return not path.startswith("metrics['aux']")


def _hashes(leaves: Leaves, ctx: DistContext) -> torch.Tensor:
    """Return `int64[len(leaves)]`: a hash of the bits and of the path of each leaf."""
    names = [xxhash.xxh3_64_intdigest(path.encode()) >> 1 for path in leaves]
    values = [hash_tensor(leaf).to(ctx.device) for leaf in leaves.values()]
    return mix_(torch.stack(values) ^ torch.tensor(names, dtype=torch.int64, device=ctx.device))


def _raise_not_repeatable(first: Leaves, second: Leaves, ctx: DistContext) -> None:
    report: list[str] = []  # empty on a rank where both runs are equal
    for path, leaf in second.items():
        difference = _difference(first.get(path), leaf)
        if difference is not None:
            report = [path, difference]
            break
    reports = gather_json(report, ctx)
    ranks = [rank for rank, differing in enumerate(reports) if differing]
    path, difference = reports[ranks[0]]
    raise PurityError(
        "two runs of `step` from the same state have different results",
        got=f"`{path}` on rank {ranks[0]}: {difference}; results differ on {_join(ranks)}",
        fix=_FIX,
    )


def _raise_different_ranks(leaves: Leaves, hashes: Sequence[int], ctx: DistContext) -> None:
    hash_of_path = dict(zip(leaves, hashes, strict=True))
    by_rank = gather_json(hash_of_path, ctx)
    for path in filter(_is_replicated, by_rank[0]):
        on_ranks = [hashes_of_rank.get(path) for hashes_of_rank in by_rank]
        if len(set(on_ranks)) == 1:
            continue
        majority = Counter(on_ranks).most_common(1)[0][0]
        reference = on_ranks.index(majority)
        # All ranks have this leaf: a step returns the same names and shapes everywhere.
        expected = broadcast(leaves[path], ctx, src=reference)
        differences = gather_json(_difference(expected, leaves[path]), ctx)
        ranks = [rank for rank, text in enumerate(differences) if text is not None]
        raise DesyncError(
            "the results of `step` differ between ranks",
            got=f"`{path}` on rank {ranks[0]}: {differences[ranks[0]]}; different on "
            f"{_join(ranks)} than on rank {reference}",
            fix="compare the states that the step started from, with "
            f"`faccel.testing.assert_replicated(state, ctx)`; if they are equal, {_FIX}",
        )


def _difference(a: torch.Tensor | None, b: torch.Tensor) -> str | None:
    """Return the number of elements whose bits differ, and the largest difference."""
    if a is None or a.shape != b.shape or a.dtype != b.dtype:
        return "another shape or dtype"
    is_different = _bits(a) != _bits(b)
    num_different = int(is_different.sum())
    if num_different == 0:
        return None
    largest = (_wide(a) - _wide(b)).abs().max().item()
    return f"{num_different} of {is_different.numel()} elements differ, by up to {largest:.3g}"


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.contiguous().view(_INTEGERS[tensor.element_size()])


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def _join(ranks: Sequence[int]) -> str:
    noun = "rank" if len(ranks) == 1 else "ranks"
    return f"{noun} {', '.join(map(str, ranks))}"
