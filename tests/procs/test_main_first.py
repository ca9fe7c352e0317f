"""`main_first` on real processes: the others wait while the first rank lives, and no longer."""

import os
import time

import pytest
import torch

import faccel
from faccel.errors import DesyncError, RankFailedError
from tests.ranks import outcomes, run_ranks

# Longer than the timeout of a collective, which is the length of a download.
TIMEOUT_S = 2
BODY_S = 3


def slow_body(ctx, local):
    with faccel.main_first(ctx, local=local):
        if ctx.is_main:
            time.sleep(BODY_S)
        finished_s = time.monotonic()
    return finished_s, int(faccel.reduce(torch.tensor(1), ctx))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("local", "debug"),
    [
        (False, False),
        pytest.param(True, False, marks=pytest.mark.slow),
        pytest.param(False, True, marks=pytest.mark.slow),
    ],
)
def test_ranks_wait_for_a_body_that_takes_longer_than_the_timeout(local, debug):
    results = run_ranks(slow_body, 3, local, timeout_s=TIMEOUT_S, debug=debug)
    times, sums = zip(*results, strict=True)
    assert min(times) == times[0]
    assert sums == (3, 3, 3)


def late_error(ctx):
    with faccel.main_first(ctx):
        if ctx.is_main:
            time.sleep(BODY_S)
            raise OSError("disk full")


@pytest.mark.slow
def test_an_error_after_the_timeout_is_raised_on_all_ranks():
    (_, first), (_, second), (_, third) = outcomes(late_error, 3, timeout_s=TIMEOUT_S)
    assert isinstance(first, OSError)
    for error in (second, third):
        assert isinstance(error, RankFailedError)
        assert error.problem == "rank 0 could not finish the body of `main_first`"
        assert error.got == "OSError: disk full"


def ends_in_the_body(ctx, local):
    with faccel.main_first(ctx, local=local):
        os._exit(3)


@pytest.mark.slow
@pytest.mark.parametrize("local", [False, True])
def test_the_others_name_a_first_rank_whose_process_ended(local):
    _, (_, second), (_, third) = outcomes(ends_in_the_body, 3, local, timeout_s=600)
    for rank, error in ((1, second), (2, third)):
        assert isinstance(error, RankFailedError)
        call = f"rank {rank} waited in main_first at tests/procs/test_main_first.py"
        assert error.problem.startswith(f"the process of rank 0 ended while {call}")


def does_not_call(ctx):
    if not ctx.is_main:
        with faccel.main_first(ctx):
            pass


def test_ranks_do_not_wait_for_a_first_rank_that_has_left():
    (succeeded, _), (_, error) = outcomes(does_not_call, 2, timeout_s=600)
    assert succeeded
    assert isinstance(error, RankFailedError)
    assert error.problem.startswith("a rank has left while rank 1 waited in main_first at")
    assert "rank 0: left" in error.got


def another_call(ctx):
    if ctx.is_main:
        faccel.barrier(ctx)
    with faccel.main_first(ctx):
        pass


def test_debug_mode_compares_it_with_another_call_at_once():
    for succeeded, error in outcomes(another_call, 2, debug=True, timeout_s=600):
        assert not succeeded
        assert isinstance(error, DesyncError)
        assert "rank 0: barrier over `world` at" in error.got
        assert "rank 1: main_first over `world` at" in error.got
