import numpy as np
import pytest
import torch
from torch import nn

import faccel
from faccel.errors import DesyncError
from faccel.testing import (
    Fault,
    InjectedError,
    assert_all_finite,
    assert_pure,
    assert_replicated,
    equal_to_single_process,
    simulate,
)


def steps(ctx):
    return [faccel.reduce(torch.ones(2), ctx) for _ in range(3)]


def test_a_rank_that_raises_at_one_collective():
    with pytest.raises(
        InjectedError, match=r"rank 1, collective 2: all_reduce at .*test_checks.py"
    ):
        simulate(steps, 3, faults=[Fault(1, 2, "raise")])


def test_a_rank_that_stalls_is_named():
    with pytest.raises(DesyncError, match=r"rank 2: stalled before all_reduce at"):
        simulate(steps, 3, faults=[Fault(2, 1, "stall")])


def test_a_corrupted_part_shows_where_it_was_used_and_nowhere_else():
    out = simulate(steps, 2, faults=[Fault(0, 1, "corrupt")])
    assert [x[0].isnan().item() for x in out[1]] == [False, True, False]
    flipped = simulate(
        lambda ctx: faccel.reduce(torch.zeros(1, dtype=torch.int64), ctx),
        2,
        faults=[Fault(1, 0, "corrupt")],
    )
    assert flipped[0].item() == -1


def test_a_fault_must_be_one_that_exists():
    with pytest.raises(ValueError, match="explode"):
        Fault(0, 0, "explode")


def test_a_nan_on_one_rank_is_found_by_agreement():
    def fn(ctx):
        loss = faccel.reduce(torch.ones(()), ctx) if ctx.rank else torch.tensor(float("nan"))
        if ctx.rank == 0:
            faccel.reduce(torch.ones(()), ctx)
        return faccel.agree(ctx, nan=loss.isnan()).raised_by

    assert simulate(fn, 3) == ({"nan": 0},) * 3


def test_all_finite_names_the_leaf():
    assert_all_finite({"a": [torch.ones(2), "text"], "n": torch.tensor([1])})
    with pytest.raises(AssertionError, match=r"\['a'\]\[1\] has 1 elements of 2"):
        assert_all_finite({"a": [torch.ones(1), torch.tensor([1.0, float("inf")])]})


def test_replicated_names_leaf_and_rank():
    simulate(lambda ctx: assert_replicated(faccel.wrap(nn.Linear(2, 2), ctx).state_dict(), ctx), 3)
    with pytest.raises(AssertionError, match=r"rank 0 and rank 1 differ in \['w'\]"):
        simulate(lambda ctx: assert_replicated({"w": torch.tensor(ctx.rank)}, ctx), 2)


@pytest.mark.parametrize(
    ("fn", "words"),
    [
        (lambda x: x.data.add_(1), "written to its argument"),
        (lambda x: x + torch.rand(1), "process-wide generator"),
        (lambda x: x + np.random.rand(), "numpy"),
        (lambda x, seen=[]: seen.append(0) or len(seen), "another result"),
    ],
)
def test_what_is_not_pure_is_found(fn, words):
    with pytest.raises(AssertionError, match=words):
        assert_pure(fn, torch.zeros(2))


def test_what_is_pure_passes():
    assert assert_pure(lambda x: {"y": x * 2}, torch.ones(1))["y"].item() == 2


def test_a_function_that_depends_on_the_world_is_found():
    equal_to_single_process(
        lambda ctx: faccel.reduce(torch.ones(3), ctx, op="mean"), world_sizes=(2, 3)
    )
    with pytest.raises(AssertionError, match="rank 0 of 2 differ"):
        equal_to_single_process(lambda ctx: faccel.reduce(torch.ones(3), ctx))
