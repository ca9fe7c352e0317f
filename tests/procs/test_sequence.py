"""Context parallel over gloo: one sequence, sharded over real processes."""

import pytest
import torch

from faccel.testing import simulate
from tests.ranks import run_ranks
from tests.world.test_sequence import (
    attend,
    attention,
    check,
    check_trained,
    full_sequence,
    functools,
    on_one_rank,
    train,
)


def attend_chunk(ctx, method, dtype):
    call = functools.partial(attention, ctx=ctx, method=method)
    return attend(ctx, call, full_sequence("grouped", dtype), is_causal=True, enable_gqa=True)


@pytest.mark.parametrize("method", ["gather", "ring", "ulysses"])
def test_attention_on_processes_equals_simulated_ranks_and_one_process(method):
    for dtype, atol in ((torch.float64, 1e-12), (torch.bfloat16, 0.04)):
        real = run_ranks(attend_chunk, 2, method, dtype, mesh="cp=2")
        check(
            real,
            on_one_rank(full_sequence("grouped", dtype), is_causal=True, enable_gqa=True),
            atol,
        )
        simulated = simulate(attend_chunk, 2, method, dtype, mesh="cp=2")
        assert all(
            torch.equal(a, b)
            for r, s in zip(real, simulated, strict=True)
            for a, b in zip(r, s, strict=True)
        )


def test_processes_train_as_one_process_does():
    check_trained(run_ranks(train, 2, "ring", mesh="cp=2"))
