"""Experts that are sharded over real processes."""

import os
import pathlib
import re
import subprocess
import sys

import pytest
import torch

import faccel
from tests.forked_python import faccel_launch
from tests.ranks import run_ranks
from tests.world.test_experts import TENSOR, check_equal, full, model, reference, train


@pytest.mark.slow
def test_processes_train_as_one_process_does():
    check_equal(run_ranks(train, 2, mesh="dp_shard=2,ep=2"), reference())


def beside_tensor_parallel(ctx):
    return train(ctx, faccel.Plan(tensor=TENSOR))


@pytest.mark.slow
def test_processes_train_experts_beside_tensor_parallel_as_one_process_does():
    check_equal(run_ranks(beside_tensor_parallel, 2, mesh="tp=2,ep=2", debug=True), reference())


def in_debug_mode(ctx):
    return train(ctx, capacity_factor=4.0)


@pytest.mark.slow
def test_debug_mode_finds_no_disagreement():
    check_equal(
        run_ranks(in_debug_mode, 2, mesh="dp_shard=2,ep=2", debug=True),
        reference(capacity_factor=4.0),
    )


def from_meta(ctx):
    with torch.device("meta" if ctx.rank else "cpu"):
        net = model()
    net = faccel.wrap(net, ctx)
    return {name: full(p) for name, p in net.named_parameters()}


def test_ranks_on_meta_get_their_experts_from_rank_0():
    want = dict(model().named_parameters())
    for got in run_ranks(from_meta, 4, mesh="dp_shard=4,ep=2"):
        assert all(torch.equal(got[name], p) for name, p in want.items())


def example(*launcher):
    command = [*launcher, "examples/moe.py", "--steps", "20"]
    root, env = pathlib.Path(__file__).parents[2], os.environ | {"OMP_NUM_THREADS": "1"}
    out = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=root, env=env, timeout=110
    )
    assert out.returncode == 0, out.stderr[-3000:]
    assert "Warning" not in out.stderr
    *steps, last = out.stdout.splitlines()
    assert [re.match(r"step +(\d+)  balance 1\.", line)[1] for line in steps] == ["10", "20"]
    return float(re.fullmatch(r"loss (\d\.\d{4})", last)[1])


@pytest.mark.slow
def test_the_example_learns_the_same_on_any_number_of_processes():
    one = example(sys.executable)
    two = example(*faccel_launch("--nproc", "2", "--mesh", "dp_shard=2,ep=2"))
    assert one < 3.0
    assert abs(one - two) < 1.5e-4  # a digit of the last place
