"""Injected faults, and the assertions of `faccel.testing`."""

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


def three_reductions(ctx):
    return [faccel.reduce(torch.ones(2), ctx) for _ in range(3)]


def test_a_fault_raises_at_one_collective_of_one_rank():
    message = r"rank 1, collective 2: all_reduce at .*test_checks.py"
    with pytest.raises(InjectedError, match=message):
        simulate(three_reductions, 3, faults=[Fault(1, 2, "raise")])


def test_a_rank_that_stalls_is_named():
    with pytest.raises(DesyncError, match=r"rank 2: stalled before all_reduce at"):
        simulate(three_reductions, 3, faults=[Fault(2, 1, "stall")])


def test_a_corrupted_input_affects_only_its_collective():
    out = simulate(three_reductions, 2, faults=[Fault(0, 1, "corrupt")])
    assert [x[0].isnan().item() for x in out[1]] == [False, True, False]
    flipped = simulate(
        lambda ctx: faccel.reduce(torch.zeros(1, dtype=torch.int64), ctx),
        2,
        faults=[Fault(1, 0, "corrupt")],
    )
    assert flipped[0].item() == -1


def test_an_unknown_kind_of_fault_is_an_error():
    with pytest.raises(ValueError, match="explode"):
        Fault(0, 0, "explode")


def test_agree_finds_a_nan_on_one_rank():
    def fn(ctx):
        loss = faccel.reduce(torch.ones(()), ctx) if ctx.rank else torch.tensor(float("nan"))
        if ctx.rank == 0:
            faccel.reduce(torch.ones(()), ctx)
        return faccel.agree(ctx, nan=loss.isnan()).raised_by

    assert simulate(fn, 3) == ({"nan": 0},) * 3


def test_assert_all_finite_names_the_leaf():
    assert_all_finite({"a": [torch.ones(2), "text"], "n": torch.tensor([1])})
    with pytest.raises(AssertionError, match=r"\['a'\]\[1\] has 1 elements of 2"):
        assert_all_finite({"a": [torch.ones(1), torch.tensor([1.0, float("inf")])]})


def test_assert_replicated_names_the_leaf_and_the_rank():
    simulate(lambda ctx: assert_replicated(faccel.wrap(nn.Linear(2, 2), ctx).state_dict(), ctx), 3)
    with pytest.raises(AssertionError, match=r"rank 0 and rank 1 differ in \['w'\]"):
        simulate(lambda ctx: assert_replicated({"w": torch.tensor(ctx.rank)}, ctx), 2)


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (lambda x: x.data.add_(1), "written to its argument"),
        (lambda x: x + torch.rand(1), "torch's process-wide generator"),
        (lambda x: x + np.random.rand(), "numpy's process-wide generator"),
        (lambda x, calls=[]: calls.append(0) or len(calls), "another result"),
    ],
)
def test_assert_pure_finds_side_effects(fn, message):
    with pytest.raises(AssertionError, match=message):
        assert_pure(fn, torch.zeros(2))


def test_assert_pure_returns_the_result_of_a_pure_function():
    assert assert_pure(lambda x: {"y": x * 2}, torch.ones(1))["y"].item() == 2


def test_equal_to_single_process_finds_a_function_that_depends_on_the_world():
    equal_to_single_process(
        lambda ctx: faccel.reduce(torch.ones(3), ctx, op="mean"), world_sizes=(2, 3)
    )
    with pytest.raises(AssertionError, match="rank 0 of 2 differ"):
        equal_to_single_process(lambda ctx: faccel.reduce(torch.ones(3), ctx))


@pytest.mark.parametrize("mesh", [None, "dp_shard=2", "dp_replicate=2,dp_shard=1"])
def test_a_wrapped_model_is_compared_by_its_full_parameters(mesh):
    def body(ctx):
        torch.manual_seed(0)
        model = faccel.wrap(nn.Linear(3, 3), ctx)
        assert_replicated(model, ctx)
        with torch.no_grad():
            bias = dict(model.named_parameters())["bias"]
            bias.add_(ctx.rank)
        if mesh != "dp_shard=2":  # shards are not replicas: rank 1 has another part of the bias
            with pytest.raises(AssertionError, match=r"rank 0 and rank 1 differ in .*bias"):
                assert_replicated(model, ctx)
        else:
            assert_replicated(model, ctx)

    simulate(body, 2, mesh=mesh)


def test_results_are_compared_within_the_tolerances():
    def sums(ctx):
        return {"x": torch.tensor(100.0 + 1e-3 * ctx.world_size), "loss": 10.0 + ctx.world_size}

    with pytest.raises(AssertionError, match=r"'loss'.*11\.0 and 12\.0"):
        equal_to_single_process(sums, world_sizes=(2,), atol=0.5)
    with pytest.raises(AssertionError, match="'x'"):
        equal_to_single_process(lambda ctx: {"x": sums(ctx)["x"]}, world_sizes=(2,), rtol=1e-6)
    equal_to_single_process(sums, world_sizes=(2,), atol=0.0, rtol=0.1)
    equal_to_single_process(sums, world_sizes=(2,), atol=1.5)
