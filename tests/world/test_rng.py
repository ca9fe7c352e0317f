"""Random states per rank, and generators derived from integers."""

import random

import numpy as np
import torch

import faccel
from faccel.testing import simulate


def draws():
    return torch.rand(()).item(), random.random(), float(np.random.randn())


def test_every_rank_resumes_from_the_generator_state_that_it_saved():
    def fn(ctx):
        draws()
        state = faccel.rng_state(ctx)
        first = [draws() for _ in range(3)]
        faccel.barrier(ctx)
        faccel.set_rng_state(state)
        return first, [draws() for _ in range(3)]

    out = simulate(fn, 3)
    assert all(first == again for first, again in out)
    assert len({tuple(first) for first, _ in out}) == 3


def test_folding_separates_streams():
    numbers = {
        torch.rand((), generator=faccel.random.generator(s, a, b)).item()
        for s in range(4)
        for a in range(4)
        for b in range(4)
    }
    assert len(numbers) == 64
