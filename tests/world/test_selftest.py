"""The checks of `faccel test` in simulated worlds."""

import json

import pytest

from faccel.testing import Fault, simulate
from faccel.testing.selftest import CHECKS, run


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
def test_every_check_passes_on_any_number_of_ranks(world_size):
    assert simulate(run, world_size) == (0,) * world_size


@pytest.mark.parametrize(
    ("mesh", "world_size"),
    [
        ("dp_shard=3", 3),
        ("dp_replicate=2,dp_shard=2", 4),
        ("dp_shard=2,tp=2", 4),
        ("dp_shard=2,pp=2", 4),
        ("cp=2", 2),
        ("dp_shard=2,ep=2", 2),
    ],
)
def test_every_check_passes_on_any_mesh(mesh, world_size):
    assert simulate(run, world_size, mesh=mesh) == (0,) * world_size


def test_a_plan_of_the_configuration_is_for_other_models():
    assert simulate(run, 2, config={"mesh": "dp_shard=2", "plan": "units=Block"}) == (0, 0)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_every_check_passes_in_low_precision(precision):
    assert simulate(run, 2, config={"mixed_precision": precision}) == (0, 0)


def test_a_failed_check_is_reported_and_the_others_still_run(capsys):
    def fn(ctx):
        return run(ctx, as_json=True)

    num_failed = simulate(fn, 2, faults=[Fault(rank=1, collective=1, kind="corrupt")])
    assert num_failed[0] == num_failed[1] >= 1
    report = json.loads(capsys.readouterr().out)["checks"]
    assert list(report) == list(CHECKS)
    assert not report["collectives"]["passed"]
    assert report["checkpoint"]["passed"]
