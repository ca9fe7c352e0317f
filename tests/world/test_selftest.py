"""`faccel test` in simulated worlds: what is right passes, what is wrong is named with its rank."""

import json

import pytest

from faccel.testing import Fault, simulate
from faccel.testing.selftest import CHECKS, run


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
def test_every_check_passes_on_any_number_of_ranks(world_size):
    assert simulate(run, world_size) == (0,) * world_size


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_it_passes_in_low_precision(precision):
    assert simulate(run, 2, config={"mixed_precision": precision}) == (0, 0)


def test_what_is_wrong_is_named_and_the_others_are_still_checked(capsys):
    def fn(ctx):
        return run(ctx, as_json=True)

    failed = simulate(fn, 2, faults=[Fault(rank=1, collective=1, kind="corrupt")])
    assert failed[0] == failed[1] >= 1
    told = json.loads(capsys.readouterr().out)["checks"]
    assert list(told) == list(CHECKS)
    assert not told["collectives"]["passed"]
    assert told["checkpoint"]["passed"]
