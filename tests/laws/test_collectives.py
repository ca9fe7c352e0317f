"""The laws of communication, run on every implementation that works here."""

from contextlib import suppress

import pytest
import torch

import faccel
from faccel.comm.row_count import RowCount
from faccel.errors import ConfigError, DataError, DesyncError, TreeError
from faccel.testing import simulate
from tests.ranks import run_ranks

WORLDS = {
    "single": lambda law: simulate(law, 1),
    "simulated-2": lambda law: simulate(law, 2),
    "simulated-3": lambda law: simulate(law, 3),
    "simulated-2-checked": lambda law: simulate(law, 2, config={"debug": True}),
    "gloo-2-checked": lambda law: run_ranks(law, 2, debug=True),
    "gloo-2": lambda law: run_ranks(law, 2),
    "gloo-3": lambda law: run_ranks(law, 3),
}
LAWS = []


def law(fn):
    LAWS.append(fn)
    return fn


def tree(rank):
    return {
        "f64": torch.arange(4.0, dtype=torch.float64).view(2, 2) + rank,
        "bf16": torch.full((2, 3), rank, dtype=torch.bfloat16),
        "bool": torch.tensor([rank == 0, True]),
        "nested": [
            torch.tensor([rank, 7], dtype=torch.int8),
            (torch.full((2, 0), 1.0), torch.ones(2, 1, 2) * rank),
        ],
        "complex": torch.tensor([1j * rank, 2.0]),
    }


def same(a, b):
    leaves, others = faccel.tree.flatten(a)[0], faccel.tree.flatten(b)[0]
    assert len(leaves) == len(others)
    for x, y in zip(leaves, others, strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y), (x, y)


@law
def gather_concatenates_in_rank_order(ctx):
    out = faccel.gather(tree(ctx.rank), ctx)
    leaves_by_rank = [faccel.tree.flatten(tree(r))[0] for r in range(ctx.world_size)]
    same(
        faccel.tree.flatten(out)[0],
        [torch.cat(leaves) for leaves in zip(*leaves_by_rank, strict=True)],
    )


@law
def gather_drops_padding_of_each_rank(ctx):
    valid = ctx.rank % 3
    out = faccel.gather(
        {"x": torch.arange(2) + 10 * ctx.rank, "loss": torch.tensor(1.0)}, ctx, num_valid=valid
    )
    assert out["x"].tolist() == [10 * r + i for r in range(ctx.world_size) for i in range(r % 3)]
    assert out["loss"].shape == (ctx.world_size,)


@law
def gather_concatenates_ragged_rows(ctx):
    out = faccel.gather([torch.full((ctx.rank, 2), ctx.rank)], ctx, ragged=True)
    assert out[0].tolist() == [[r, r] for r in range(ctx.world_size) for _ in range(r)]


@law
def a_row_count_out_of_range_is_an_error(ctx):
    for bad in (-1, 3):
        with pytest.raises(DataError):
            faccel.gather(torch.zeros(2), ctx, num_valid=bad)
    with pytest.raises(DataError, match="same 2 rows"):
        faccel.gather([torch.zeros(2), torch.zeros(3, 3)], ctx, num_valid=1)


@law
def results_are_fresh_and_arguments_untouched(ctx):
    x = {"a": torch.ones(3, requires_grad=True), "b": torch.ones(2, dtype=torch.int64)}
    for fn in (faccel.gather, faccel.reduce, faccel.broadcast):
        out = fn(x, ctx)
        assert not out["a"].requires_grad
        out["a"].add_(5)
        out["b"].add_(5)
        assert x["a"].tolist() == [1, 1, 1]
        assert x["b"].tolist() == [1, 1]
        assert out["a"].untyped_storage().data_ptr() != out["b"].untyped_storage().data_ptr()
        assert out["a"].untyped_storage().nbytes() == out["a"].nbytes


@law
def reduce_does_each_operation(ctx):
    n = ctx.world_size
    x = {
        "f": torch.tensor([1.0, ctx.rank]),
        "i": torch.tensor(ctx.rank + 1),
        "b": torch.tensor(ctx.rank == 0),
    }
    last, factorial = n - 1, [1, 1, 2, 6][n]
    total = n * last / 2
    expected = {
        "sum": (torch.tensor([n, total]), torch.tensor(int(total) + n), torch.tensor(1)),
        "mean": (torch.tensor([1.0, total / n]), torch.tensor(total / n + 1), torch.tensor(1 / n)),
        "min": (torch.tensor([1.0, 0.0]), torch.tensor(1), torch.tensor(n == 1)),
        "max": (torch.tensor([1.0, last]), torch.tensor(n), torch.tensor(True)),
        "prod": (torch.tensor([1.0, 0.0]), torch.tensor(factorial), torch.tensor(n == 1)),
    }
    for op, (f, i, b) in expected.items():
        same(faccel.reduce(x, ctx, op=op), {"f": f, "i": i, "b": b})


# Below and above the size up to which gloo sends rows of a fixed size, and none.
SIZES = (0, 1, 31, 32, 62, 63, 125, 300)
DTYPES = (
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
)
OPS = {"sum": torch.sum, "min": torch.amin, "max": torch.amax, "prod": torch.prod}


@law
def reductions_and_gathers_of_any_size_and_dtype_are_exact(ctx):
    for dtype in DTYPES:
        for size in SIZES:
            # Small integers, which every dtype has.
            rows = [
                (torch.arange(size) % 3 + r + 1).to(dtype).view(-1, 1)
                for r in range(ctx.world_size)
            ]
            own = rows[ctx.rank]
            stacked = torch.stack(rows).to(torch.float64)
            gathered = faccel.gather(own, ctx)
            assert gathered.dtype == dtype
            assert torch.equal(gathered, torch.cat(rows)), (dtype, size)
            for op, plain in OPS.items():
                result = faccel.reduce(own, ctx, op=op)
                assert result.shape == own.shape
                assert torch.equal(result.double(), plain(stacked, 0)), (dtype, size, op)


@law
def columns_and_conjugates_are_reduced(ctx):
    square = torch.arange(9.0).view(3, 3) + ctx.rank
    total = sum(torch.arange(9.0).view(3, 3) + r for r in range(ctx.world_size))
    assert torch.equal(faccel.reduce(square.t(), ctx), total.t())
    assert torch.equal(faccel.reduce(square[:, 1], ctx), total[:, 1])
    assert torch.equal(faccel.reduce(square[::2, ::2], ctx), total[::2, ::2])
    z = torch.complex(square, square).conj()
    assert torch.equal(faccel.reduce(z, ctx), torch.complex(total, -total))
    assert torch.equal(
        faccel.gather(z, ctx)[:3], torch.complex(square, -square) - ctx.rank * (1 - 1j)
    )


@law
def elements_with_gaps_are_reduced(ctx):
    # With a single element, too, whose stride PyTorch does not reset in `contiguous`.
    for x in (torch.arange(8.0)[::2], torch.arange(8.0)[::8], torch.ones(()).expand(3)):
        assert torch.equal(ctx.comm.all_reduce(x, "sum", "world"), ctx.world_size * x)


@law
def the_default_device_of_the_user_does_not_matter(ctx):
    few, many = torch.ones(3), torch.ones(300)
    with torch.device("meta"):
        for x in (few, many):
            assert faccel.reduce(x, ctx).sum().item() == ctx.world_size * len(x)
            assert faccel.gather(x, ctx).sum().item() == ctx.world_size * len(x)
        assert faccel.agree(ctx, stop=True).stop
        assert faccel.gather_objects(1, ctx) == [1] * ctx.world_size
        faccel.barrier(ctx)


@law
def a_call_that_raises_on_one_rank_does_not_describe_its_next_one(ctx):
    if ctx.rank == 0:
        with pytest.raises(ConfigError):
            faccel.gather(torch.ones(2), ctx, axis="dat")
    assert faccel.gather_objects(ctx.rank, ctx) == list(range(ctx.world_size))


@law
def row_counts_of_a_loader_and_plain_ones_are_gathered_together(ctx):
    num_valid = RowCount(1, 2) if ctx.rank else 1
    rows = faccel.gather(torch.full((2,), ctx.rank), ctx, num_valid=num_valid)
    assert rows.tolist() == list(range(ctx.world_size))


@law
def an_unknown_reduction_is_an_error(ctx):
    with pytest.raises(ConfigError, match="`mean`"):
        faccel.reduce(torch.ones(1), ctx, op="meen")


@law
def broadcast_returns_the_values_of_the_source(ctx):
    src = ctx.world_size - 1
    same(faccel.broadcast(tree(ctx.rank), ctx, src=src), tree(src))
    with pytest.raises(ConfigError):
        faccel.broadcast(torch.ones(1), ctx, src=ctx.world_size)


@law
def objects_are_gathered_and_broadcast(ctx):
    own_value = {"rank": ctx.rank, "text": "é" * 1000 * ctx.rank}
    assert [x["rank"] for x in faccel.gather_objects(own_value, ctx)] == list(range(ctx.world_size))
    objs = [ctx.rank, "x"]
    out = faccel.broadcast_objects(objs, ctx, src=ctx.world_size - 1)
    assert out == [ctx.world_size - 1, "x"]
    assert objs == [ctx.rank, "x"]


@law
def scatter_sends_each_rank_its_item(ctx):
    items = [{"r": r, "x": torch.full((r,), r)} for r in range(ctx.world_size)]
    for src in range(ctx.world_size):
        out = faccel.comm.scatter_objects(items if ctx.rank == src else None, ctx, src=src)
        assert (out["r"], out["x"].tolist()) == (ctx.rank, [ctx.rank] * ctx.rank)


@law
def all_to_all_transposes(ctx):
    n, r = ctx.world_size, ctx.rank
    x = {
        "a": 10 * r + torch.arange(n),
        "b": torch.full((n, 2, 3), r, dtype=torch.bfloat16),
        "e": torch.ones(n, 0),
    }
    out = faccel.comm.all_to_all(x, ctx)
    assert out["a"].tolist() == [10 * i + r for i in range(n)]
    assert out["b"][:, 0, 0].tolist() == list(range(n))
    assert out["e"].shape == (n, 0)
    with pytest.raises(TreeError, match="one row per rank"):
        faccel.comm.all_to_all(torch.ones(n + 1), ctx)


@law
def padding_reaches_the_longest(ctx):
    n, r = ctx.world_size, ctx.rank
    x = {"x": torch.ones(2, r + 1), "s": torch.tensor(1)}
    out = faccel.comm.pad_across(x, ctx, dim=1, value=-1)
    assert out["x"].tolist() == [[1.0] * (r + 1) + [-1.0] * (n - 1 - r)] * 2
    assert out["s"].item() == 1
    front = faccel.comm.pad_across(torch.ones(r + 1), ctx, dim=-1, first=True)
    assert front.tolist() == [0.0] * (n - 1 - r) + [1.0] * (r + 1)


@law
def agreement_is_the_same_on_every_rank(ctx):
    last = ctx.world_size - 1
    verdict = faccel.agree(
        ctx, stop=False, nan=torch.tensor(float("nan") if ctx.rank == last else 0.0).isnan()
    )
    assert verdict.nan
    assert not verdict["stop"]
    assert verdict.raised_by == {"nan": last, "stop": None}
    assert verdict.any
    assert not faccel.agree(ctx).any


@law
def ranks_that_ask_about_different_flags_are_an_error(ctx):
    if ctx.world_size > 1:
        with pytest.raises(DesyncError, match="flags"):
            faccel.agree(ctx, **({"nan": True} if ctx.rank else {"stop": True}))


@law
def an_unsupported_leaf_is_named(ctx):
    with pytest.raises(TreeError, match=r"\['a'\]\[1\]"):
        faccel.gather({"a": [torch.ones(1), "text"]}, ctx)
    with pytest.raises(TreeError, match="sparse"):
        faccel.reduce(torch.eye(2).to_sparse(), ctx)


@law
def an_unknown_axis_is_named(ctx):
    for call in (faccel.gather, faccel.reduce):
        with pytest.raises(ConfigError, match="`data`"):
            call(torch.ones(1), ctx, axis="dat")
    faccel.barrier(ctx, axis="data")


@law
def different_shapes_or_dtypes_are_an_error_on_every_rank(ctx):
    if ctx.world_size == 1:
        return
    first = ctx.rank == 0
    with pytest.raises(
        DesyncError, match=r"float32\[3\]|float32\[4\]"
    ):  # as many bytes, once they are padded
        faccel.gather(torch.ones(3 if first else 4), ctx)
    with pytest.raises(DesyncError, match=r"int32|float32"):
        faccel.gather(torch.ones(4, dtype=torch.int32 if first else torch.float32), ctx)
    with pytest.raises(DesyncError):
        faccel.gather(torch.ones(3 if first else 4), ctx, num_valid=2)
    dtype, shape = (torch.int32, (3, 2)) if first else (torch.float32, (2, 3))
    for rows in (torch.ones(ctx.world_size, 4, dtype=dtype), torch.ones(ctx.world_size, *shape)):
        with pytest.raises(DesyncError, match=r"int32|float32"):
            faccel.comm.all_to_all({"x": rows}, ctx)
    own_value = torch.ones(4, dtype=torch.float32 if first else torch.int32)
    with (
        suppress(DesyncError) if first else pytest.raises(DesyncError)
    ):  # the source sees it in debug mode only
        faccel.broadcast(own_value, ctx)


@law
def views_and_empty_tensors_are_gathered(ctx):
    z = torch.tensor([1 + 2j])
    out = faccel.gather(
        {
            "conj": z.conj(),
            "neg": z.conj().imag,
            "none": torch.empty(0, 3),
            "t": torch.ones(2, 3).T,
        },
        ctx,
    )
    assert out["conj"].tolist() == [1 - 2j] * ctx.world_size
    assert out["neg"].tolist() == [-2.0] * ctx.world_size
    assert out["none"].shape == (0, 3)
    assert out["t"].shape == (3 * ctx.world_size, 2)
    assert faccel.gather(torch.empty(0, 3), ctx).shape == (0, 3)
    assert faccel.reduce(torch.tensor([2], dtype=torch.int16), ctx).tolist() == [2 * ctx.world_size]


@law
def an_axis_of_the_mesh_can_be_named(ctx):
    assert faccel.reduce(torch.tensor(1), ctx, axis="dp_replicate").item() == ctx.world_size


@law
def dicts_filled_in_another_order_agree(ctx):
    keys = ["a", "b", "c"] if ctx.rank % 2 else ["c", "b", "a"]
    out = faccel.gather({k: torch.tensor([ord(k)]) for k in keys}, ctx)
    assert list(out) == keys
    assert all(out[k].tolist() == [ord(k)] * ctx.world_size for k in keys)


@law
def tensordicts_are_gathered(ctx):
    from tensordict import TensorDict

    out = faccel.gather(
        TensorDict({"x": torch.ones(2, 3) * ctx.rank, "y": {"z": torch.ones(2)}}, batch_size=[2]),
        ctx,
    )
    assert out.batch_size == (2 * ctx.world_size,)
    assert out["y", "z"].shape == (2 * ctx.world_size,)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("check", LAWS, ids=lambda fn: fn.__name__)
def test_law(world, check):
    WORLDS[world](check)
