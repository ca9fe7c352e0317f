"""Debug mode in the simulated world: what ranks are about to do is compared before they do it."""

import contextlib

import pytest
import torch

import faccel
from faccel.errors import DesyncError
from faccel.testing import simulate

CHECKED = {"debug": True}


def errors_of(fn, world_size=2, **options):
    """Return the error of each rank, and check that a later collective works."""

    def body(ctx):
        with pytest.raises(DesyncError) as caught:
            fn(ctx)
        assert faccel.reduce(torch.tensor(1), ctx).item() == world_size
        return caught.value.got

    return simulate(body, world_size, config=CHECKED, **options)


APART = {
    "op": lambda ctx: faccel.reduce(torch.ones(2), ctx, op="max" if ctx.rank else "sum"),
    "shape": lambda ctx: faccel.reduce(torch.ones(4) if ctx.rank else torch.ones(2, 2), ctx),
    "dtype": lambda ctx: faccel.reduce(
        torch.ones(2, dtype=torch.int32 if ctx.rank else torch.float32), ctx
    ),
    "keys": lambda ctx: faccel.reduce({"ab"[ctx.rank]: torch.ones(2)}, ctx),
    "axis": lambda ctx: faccel.reduce(
        torch.ones(2), ctx, axis="dp_replicate" if ctx.rank else "world"
    ),
    "src": lambda ctx: faccel.broadcast(torch.ones(2), ctx, src=ctx.rank),
    "leaves": lambda ctx: faccel.gather([torch.ones(2)] * (1 + ctx.rank), ctx),
    "call": lambda ctx: (faccel.gather if ctx.rank else faccel.broadcast)(torch.ones(2), ctx),
    "rows": lambda ctx: faccel.comm.all_to_all(torch.ones(2, 2 + ctx.rank), ctx),
}


@pytest.mark.parametrize("what", APART)
def test_each_difference_raises_on_every_rank_and_both_calls_are_named(what):
    first, second = errors_of(APART[what])
    assert first == second
    assert "rank 0: " in first
    assert "rank 1: " in first
    assert "test_debug.py:" in first


def test_calls_from_different_lines_are_a_difference():
    def body(ctx):
        if ctx.rank:
            faccel.barrier(ctx)
        else:
            faccel.barrier(ctx)

    got = errors_of(body)[0]
    lines = {clause.rpartition(":")[2] for clause in got.split(", ")}
    assert len(lines) == 2


def test_leaves_are_named():
    got = errors_of(
        lambda ctx: faccel.reduce({"a": [torch.ones(1)], "b" * (1 + ctx.rank): torch.ones(3)}, ctx)
    )[0]
    assert "x['a'][0]: float32[1], x['b']: float32[3]" in got
    assert "x['bb']: float32[3]" in got


def test_correct_calls_pass():
    def body(ctx):
        with faccel.main_first(ctx):
            pass
        faccel.gather(torch.ones(ctx.rank + 1), ctx, ragged=True)
        faccel.gather(torch.ones(3), ctx, num_valid=ctx.rank)
        faccel.gather_objects("x" * ctx.rank, ctx)
        faccel.comm.pad_across(torch.ones(ctx.rank + 1), ctx)
        faccel.broadcast_objects([1] * ctx.rank, ctx, src=1)
        return faccel.agree(ctx, stop=ctx.rank == 1).raised_by

    assert simulate(body, 3, config=CHECKED) == ({"stop": 1},) * 3


def test_a_call_that_ends_at_different_lines_passes():
    def body(ctx):
        with contextlib.ExitStack() as stack:
            stack.enter_context(faccel.main_first(ctx))
        faccel.reduce({}, ctx)
        return faccel.agree(ctx, a=True).a

    assert simulate(body, 2, config=CHECKED) == (True, True)


def test_a_rank_that_never_calls_is_a_desync():
    with pytest.raises(DesyncError, match="rank 1: returned"):
        simulate(lambda ctx: ctx.is_main and faccel.barrier(ctx), 2, config=CHECKED)


def test_debug_mode_works_on_one_process():
    assert simulate(lambda ctx: faccel.reduce(torch.tensor(2), ctx).item(), 1, config=CHECKED) == (
        2,
    )


def test_keys_are_deleted_from_the_store():
    """The keys of a call are deleted by the next one."""

    def body(ctx):
        for _ in range(5):
            faccel.barrier(ctx)
        return ctx.comm.exchange.store.num_keys()

    def more(ctx):
        for _ in range(50):
            faccel.barrier(ctx)
        return ctx.comm.exchange.store.num_keys()

    assert max(simulate(more, 2, config=CHECKED)) <= max(simulate(body, 2, config=CHECKED))
