"""`assert_replicated(..., hashed=True)`: a flipped bit in any replica is found and named."""

import math
import re
from collections import Counter

import numpy as np
import pytest
import torch

import faccel
from faccel.errors import TreeError
from faccel.testing import assert_replicated, simulate
from faccel.training.tensor_hash import hash_tensor
from faccel.tree import local_tensor
from tests.cases.worlds import WORLDS, backward, build
from tests.ranks import run_ranks

DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
    torch.complex64, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip


def random(dtype, size=11, seed=0):
    generator = faccel.random.generator(seed)
    if dtype == torch.bool:
        return torch.rand(size, generator=generator) > 0.5
    if dtype == torch.complex64:
        return torch.randn(size, generator=generator, dtype=dtype)
    return (torch.randn(size, generator=generator) * 50).to(dtype)


def flip(tensor, element, bit=0):
    """Flip one bit of an element in place."""
    array = tensor.detach().view(-1)[element : element + 1].view(torch.uint8)
    array[bit // 8] ^= 1 << bit % 8


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_single_bit_changes_the_hash(dtype):
    # 11 elements: no multiple of 8 bytes for the small types.
    original = random(dtype)
    seen = {hash_tensor(original).item()}
    num_bits = 1 if dtype == torch.bool else 8 * original.element_size()
    for element in range(len(original)):
        for bit in range(num_bits):
            changed = original.clone()
            flip(changed, element, bit)
            seen.add(hash_tensor(changed).item())
    assert len(seen) == 1 + num_bits * len(original)


def test_the_hash_depends_on_the_bits_and_on_nothing_else():
    x = random(torch.float32, 60).view(6, 10)
    expected = hash_tensor(x).item()
    for same in (x.clone(), x.t().contiguous().t(), torch.cat([x, x])[6:], x.requires_grad_()):
        assert hash_tensor(same).item() == expected
    unaligned = torch.cat([torch.zeros(1), x.detach().view(-1)])[1:]
    assert hash_tensor(unaligned).item() == expected
    rows = x.detach()
    for other in (rows.flip(0), rows[[1, 0, 2, 3, 4, 5]], -rows, rows[:5], rows + 0.0 * math.nan):
        assert hash_tensor(other).item() != expected
    assert hash_tensor(torch.zeros(4)).item() != hash_tensor(torch.zeros(6)).item()
    assert hash_tensor(torch.tensor(0.0)).item() != hash_tensor(torch.tensor(-0.0)).item()


def test_nans_of_other_bits_differ():
    nans = torch.tensor([0x7FC00000, 0x7FC00001], dtype=torch.int32).view(torch.float32)
    assert nans.isnan().all()
    assert hash_tensor(nans[0]).item() != hash_tensor(nans[1]).item()
    assert hash_tensor(nans[0]).item() == hash_tensor(nans[0].clone()).item()


CHUNK = 1 << 17  # words, on the host


def test_a_large_tensor_is_hashed_in_chunks():
    x = torch.zeros(CHUNK + 5, dtype=torch.int64)
    hashes = {hash_tensor(x).item()}
    for element in (CHUNK - 1, CHUNK):
        y = x.clone()
        flip(y, element, 63)
        hashes.add(hash_tensor(y).item())
    assert len(hashes) == 3


def test_sparse_values_and_indices_count():
    def sparse(index, value):
        return torch.sparse_coo_tensor(
            [[index, 3, 3]], [value, 1.0, 2.0], (5,), check_invariants=True
        )

    assert hash_tensor(sparse(0, 1.0)) == hash_tensor(sparse(0, 1.0).coalesce())
    assert hash_tensor(sparse(0, 1.0)) != hash_tensor(sparse(1, 1.0))
    assert hash_tensor(sparse(0, 1.0)) != hash_tensor(sparse(0, 2.0))


# The tensor whose bit is flipped on a rank, by layout: one that other ranks have, too. FSDP2 has
# one copy of each parameter, of each gradient and of their state; the number of steps is
# replicated, and so are the buffers.
KINDS = {
    "param": lambda model, opt: model.get_parameter("first.weight"),
    "grad": lambda model, opt: model.get_parameter("first.weight").grad,
    "state": lambda model, opt: opt.state[model.get_parameter("first.weight")]["exp_avg"],
    "step": lambda model, opt: opt.state[next(iter(model.parameters()))]["step"],
    "buffer": lambda model, opt: model.get_buffer("count"),
}
PATHS = {
    "param": "['model']['params']['first.weight']",
    "grad": "['model']['grads']['first.weight']",
    "state": "['opt']['state']['first.weight']['exp_avg']",
    "step": "['step']",
    "buffer": "['model']['buffers']['count']",
}
ALL = ("param", "grad", "state", "step", "buffer")
COPIES = {
    "ddp": ALL, "ddp-3": ALL, "zero-1": ("param", "grad", "buffer"), "fsdp": ("step", "buffer"),
    "hsdp": ALL, "tp": ALL, "fsdp-tp": ALL, "cp": ("step", "buffer"), "pp-fsdp": ("step",),
}  # fmt: skip


def train_and_flip(ctx, plan, kinds, rank):
    """Compare at every moment of two updates; then flip a bit on one rank, and compare again.

    Returns the messages, by what was flipped.
    """
    model, opt = build(ctx, plan, "AdamW")
    if ctx.mesh.spec.pp == 1:
        model.module.register_buffer("count", torch.zeros(3))
    scaler = faccel.init_scaler(ctx)
    state = {"model": model, "opt": opt, "lr": 0.1, "name": "run"}
    for update in range(2):
        assert_replicated(state, ctx, hashed=True)
        scaler = backward(ctx, model, scaler, update)
        assert_replicated(state, ctx, hashed=True)
        if update == 0:
            _, scaler = faccel.optimizer_step(opt, scaler, ctx)
    messages = {}
    for kind in kinds:
        tensor = local_tensor(KINDS[kind](model.module, opt))
        if ctx.rank == rank:
            flip(tensor, tensor.numel() - 1)
        with pytest.raises(AssertionError) as caught:
            assert_replicated(state, ctx, hashed=True)
        messages[kind] = str(caught.value)
        if ctx.rank == rank:
            flip(tensor, tensor.numel() - 1)
        assert_replicated(state, ctx, hashed=True)
    return messages


@pytest.mark.parametrize("name", ["single", "pp", *COPIES])
def test_a_flipped_bit_is_found_and_named_on_every_rank(name):
    where, kinds = WORLDS[name], COPIES.get(name, ())
    rank = where.size - 1
    results = simulate(train_and_flip, where.size, where.plan, kinds, rank, mesh=where.mesh)
    for kind in kinds:
        (message,) = {messages[kind] for messages in results}
        assert PATHS[kind] in message
        assert re.search(rf"\b{rank}\b", message)


@pytest.mark.parametrize(
    ("world_size", "bad", "expected"),
    [
        (2, {1}, "`['x']` differs between ranks 0, 1, and no value has a majority"),
        (3, {0}, "`['x']` differs on rank 0 from ranks 1, 2"),
        (5, {1, 3}, "`['x']` differs on ranks 1, 3 from ranks 0, 2, 4"),
    ],
)
def test_the_ranks_that_differ_from_the_majority_are_named(world_size, bad, expected):
    def fn(ctx):
        x = torch.arange(6.0)
        if ctx.rank in bad:
            flip(x, 2, 30)
        with pytest.raises(AssertionError) as caught:
            assert_replicated({"x": x, "y": [x.clone(), 1]}, ctx, hashed=True)
        return str(caught.value)

    for message in simulate(fn, world_size):
        assert message == f"{expected}; 1 more differ"


OTHER_VALUES = {
    "number": (1, 2), "float": (0.1, 0.1 + 1e-17 + 2e-17), "text": ("a", "b"),
    "shape": (torch.zeros(2, 3), torch.zeros(3, 2)),
    "dtype": (torch.zeros(2), torch.zeros(2, dtype=torch.int32)),
    "zero": (torch.tensor(0.0), torch.tensor(-0.0)), "array": (np.zeros(2), np.ones(2)),
    "structure": ([torch.ones(1)], [torch.ones(1), torch.ones(1)]),
    "keys": ({"a": 1}, {"b": 1}),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_VALUES)
def test_all_ranks_raise_for_other_values_and_structures(name):
    def fn(ctx):
        assert_replicated({"x": OTHER_VALUES[name][0]}, ctx, hashed=True)
        with pytest.raises(AssertionError, match="x"):
            assert_replicated({"x": OTHER_VALUES[name][ctx.rank == 1]}, ctx, hashed=True)

    simulate(fn, 3)


def test_an_axis_is_compared_alone():
    def fn(ctx):
        index = ctx.mesh.spec.coordinates(ctx.rank)["tp"]
        assert_replicated(torch.tensor(index), ctx, axis="dp_replicate", hashed=True)
        with pytest.raises(AssertionError, match="the value itself"):
            assert_replicated(torch.tensor(index), ctx, axis="tp", hashed=True)
        with pytest.raises(TreeError, match=r"\['f'\].*builtin_function"):
            assert_replicated({"f": len}, ctx, hashed=True)

    simulate(fn, 4, mesh="dp_replicate=2,tp=2")


@pytest.mark.parametrize("name", ["ddp", "fsdp-tp", "pp-fsdp"])
def test_it_costs_one_reduction_of_one_number(name):
    where = WORLDS[name]

    def fn(ctx, num_checks):
        model, opt = build(ctx, where.plan, "AdamW")
        for _ in range(num_checks):
            assert_replicated({"model": model, "opt": opt}, ctx, hashed=True)

    def calls(num_checks):
        trace = simulate(fn, where.size, num_checks, mesh=where.mesh).trace
        return Counter((event.rank, event.op, event.num_bytes) for event in trace)

    assert calls(1) - calls(0) == {(rank, "all_reduce", 8): 1 for rank in range(where.size)}


def real(ctx):
    return train_and_flip(ctx, WORLDS["ddp"].plan, ALL, 1)


@pytest.mark.slow
def test_real_ranks_name_the_leaf():
    for messages in run_ranks(real, 2, mesh="dp_replicate=2"):
        assert all(PATHS[kind] in messages[kind] for kind in ALL)
