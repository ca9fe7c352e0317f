"""Calls of `torch.distributed` and disagreements of ranks over gloo: plain and in debug mode."""

import pytest

from faccel.testing import simulate
from tests.c10d_calls import CASES, WORLD_SIZE, all_outcomes, outcome
from tests.desyncs import CASES as DESYNCS
from tests.desyncs import DDP, FSDP, TP, run_all
from tests.ranks import run_ranks
from tests.world.test_desyncs import assert_both_sites_are_named

# What gloo computes and a simulated world refuses: it has no `gloo` backend, and gloo writes past a
# tensor with gaps.
REFUSED = ("all_reduce of a slice", "monitored_barrier")


def is_error(value):
    return isinstance(value, str) and "Error: " in value


@pytest.mark.slow
def test_a_simulated_world_and_debug_mode_compute_what_gloo_computes():
    names = list(CASES)
    gloo = run_ranks(all_outcomes, WORLD_SIZE, names)
    debug = run_ranks(all_outcomes, WORLD_SIZE, names, debug=True)
    for name in names:
        simulated = simulate(lambda ctx, name=name: outcome(name, ctx), WORLD_SIZE)
        for rank in range(WORLD_SIZE):
            expected = gloo[rank][name]
            if is_error(expected) or name in REFUSED:
                assert is_error(simulated[rank]), (name, rank, expected, simulated[rank])
            else:
                assert simulated[rank] == expected, (name, rank)
            if name != "monitored_barrier":
                assert is_error(debug[rank][name]) == is_error(expected), (name, debug[rank][name])
                assert is_error(expected) or debug[rank][name] == expected, (name, rank)


@pytest.mark.parametrize("mesh", [DDP, FSDP, TP])
def test_debug_mode_finds_each_disagreement_of_equal_shapes(mesh):
    cases = [case for case, case_mesh in DESYNCS.items() if case_mesh == mesh]
    first, second = run_ranks(run_all, 2, cases, mesh=mesh, debug=True)
    assert first == second
    assert list(first) == [case.__name__ for case in cases]
    for got in first.values():
        assert_both_sites_are_named(got)
