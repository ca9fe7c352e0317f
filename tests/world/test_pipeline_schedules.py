"""Each schedule of PyTorch equals one process: training, inference, checkpoints, short windows."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import faccel
from faccel.errors import ConfigError, ModelError
from faccel.parallel import PipelineConfig
from faccel.plan import SCHEDULES, SPLIT_BACKWARD_SCHEDULES, V_SCHEDULES
from faccel.testing import simulate
from tests.models import loss_of, model, tokens
from tests.training import CHAIN, differences, full, train

SLOW = pytest.mark.slow
pytestmark = pytest.mark.filterwarnings("ignore")  # advice of torch on layouts
STAGES = {"1f1b": 1, "gpipe": 1} | {name: 2 for name in SCHEDULES if name not in ("1f1b", "gpipe")}
LOOPS = [name for name in SCHEDULES if name not in V_SCHEDULES]


def size_of(mesh):
    return faccel.MeshSpec.of(mesh).size


def plan_of(schedule, stages=None, **options):
    pipeline = PipelineConfig(
        chain=CHAIN, schedule=schedule, stages_per_rank=stages or STAGES[schedule]
    )
    return faccel.Plan(**{"units": "Block", "pipeline": pipeline, **options})


def is_tied(schedule):
    # The first and the last stage of a V are on one rank, which refuses tied weights.
    return schedule not in V_SCHEDULES


@pytest.fixture(scope="module")
def one():
    """What one process computes, by the options of `train`."""
    results = {}

    def reference(**options):
        key = str(sorted(options.items(), key=str))
        if key not in results:
            (results[key],) = simulate(lambda ctx: train(ctx, **options), 1)
        return results[key]

    return reference


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("mesh", ["pp=2", "pp=2,dp_shard=2"])
def test_in_fp64_with_accumulation(schedule, mesh, one):
    options = {"tied": is_tied(schedule)}
    plan = plan_of(schedule)
    for got in simulate(lambda ctx: train(ctx, plan, **options), size_of(mesh), mesh=mesh):
        far = differences(got, one(**options))
        assert max(far.values()) < 1e-10, far


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_with_activation_checkpointing(schedule, one):
    options = {"tied": is_tied(schedule)}
    plan = plan_of(schedule, activation_checkpoint="full")
    for got in simulate(lambda ctx: train(ctx, plan, **options), 2, mesh="pp=2"):
        far = differences(got, one(**options))
        assert max(far.values()) < 1e-10, far


if __name__ == "__main__":
    pass
