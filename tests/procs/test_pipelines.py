"""Pipelines on real processes, which communicate over gloo, train as one process does."""

import pytest

from faccel.testing import fake_context
from tests.hf import test_decoder_pipelines as decoders
from tests.ranks import run_ranks
from tests.training import differences, train
from tests.world.test_pipeline_schedules import plan_of

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # advice of torch on layouts
ONE = fake_context(0, 1)


def train_zbv(ctx):
    return train(ctx, plan_of("zbv"), tied=False)


def test_a_schedule_that_splits_the_backward_equals_one_process():
    expected = train(ONE, tied=False)
    for got in run_ranks(train_zbv, 2, mesh="pp=2"):
        far = differences(got, expected)
        assert max(far.values()) < 1e-10, far


def train_llama(ctx):
    change = {"schedule": "interleaved-zero-bubble", "stages_per_rank": 2}
    return decoders.run(ctx, "llama", change)[0]


def test_a_decoder_of_transformers_equals_one_process():
    expected = decoders.run(ONE, "llama")[0]
    for values in run_ranks(train_llama, 2, mesh="pp=2"):
        for got, value in zip(values, expected, strict=True):
            # transformers computes the loss in fp32
            assert got == pytest.approx(value, abs=1e-6)
