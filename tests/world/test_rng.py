"""Random states per rank, and generators derived from integers."""

import random

import numpy as np
import torch
from torch.utils.data import DataLoader

import faccel
from faccel.testing import fake_context, simulate


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


def test_the_order_of_the_data_follows_from_its_seed_and_not_from_seed_everything():
    def order(seed, *, config=0, argument=None, generator=None):
        ctx = fake_context(0, 1, config={"seed": config})
        faccel.seed_everything(seed, ctx)
        data = DataLoader(torch.arange(8), 8, shuffle=True, generator=generator)
        return next(iter(faccel.shard(data, ctx, seed=argument).at(0))).tolist()

    assert order(1) == order(2)
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        orders = [order(0, config=seed), order(0, argument=seed), order(0, generator=generator)]
        assert orders == [orders[0]] * 3
        assert orders[0] != order(0)


def test_noise_is_equal_on_every_rank_until_it_is_seeded_per_data_rank():
    def fn(ctx, per_data_rank):
        faccel.seed_everything(0, ctx)
        plan = faccel.Plan(tensor={"0": "colwise", "1": "rowwise"})
        net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
        faccel.wrap(net, ctx, plan=plan)
        if per_data_rank:
            faccel.seed_everything(0, ctx, per_data_rank=True)
        return draws()

    assert len(set(simulate(fn, 4, False))) == 1
    assert len(set(simulate(fn, 4, True))) == 4
    assert len(set(simulate(fn, 4, True, mesh="dp_replicate=2,tp=2"))) == 2


def test_folding_separates_streams():
    numbers = {
        torch.rand((), generator=faccel.random.generator(s, a, b)).item()
        for s in range(4)
        for a in range(4)
        for b in range(4)
    }
    assert len(numbers) == 64
