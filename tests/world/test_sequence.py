# pyright: basic
"""Context parallel attention equals attention on the full sequence on one process."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.exc import Unsupported
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import CheckpointError, checkpoint
from torch.utils.flop_counter import FlopCounterMode

import faccel
from faccel.errors import ConfigError, DataError, ModelError, TreeError
from faccel.parallel.context_parallelism import attention, context_parallel, split_sequence
from faccel.testing import fake_context, simulate
from tests.models import LENGTH, CharModel, Embed, loss_of, tokens

METHODS = pytest.mark.parametrize("method", ["gather", "ring", "ulysses"])
LAYOUTS = pytest.mark.parametrize("layout", ["contiguous", "head-tail"])
SHAPES = {
    "as many": (4, 4, 8),
    "grouped": (4, 2, 8),
    "one key head": (4, 1, 8),
    "narrow values": (4, 4, 6),
}


def full_sequence(shape="as many", dtype=torch.float64, length=8):
    """Queries, keys, values and the gradient of the output, for the whole sequence."""
    heads, key_heads, value_width = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    shapes = [(heads, 8), (key_heads, 8), (key_heads, value_width), (heads, value_width)]
    return [
        torch.randn(2, n, length, width, generator=generator, dtype=torch.float64).to(dtype)
        for n, width in shapes
    ]


def attend(ctx, call, values, **options):
    """The output of `call` for this rank's chunks, and the gradients of q, k and v."""
    *inputs, grad = (x.detach().clone() for x in split_sequence(tuple(values), ctx, dim=2))
    for x in inputs:
        x.requires_grad_()
    out = call(*inputs, **options)
    out.backward(grad.to(out.dtype))
    return out.detach(), *(x.grad for x in inputs)


def on_one_rank(values, **options):
    return attend(fake_context(0, 1), F.scaled_dot_product_attention, values, **options)


def on_ranks(size, values, layout="contiguous", **options):
    def run(ctx):
        return attend(ctx, functools.partial(attention, ctx=ctx), values, **options)

    return simulate(run, size, mesh=f"cp={size}", config={"cp_layout": layout})


def joined(chunks, layout, dim):
    """The full sequence of the chunks of all ranks."""
    if layout == "contiguous":
        return torch.cat(chunks, dim)
    heads, tails = zip(*(chunk.tensor_split(2, dim) for chunk in chunks), strict=True)
    return torch.cat([*heads, *reversed(tails)], dim)


def check(ranks, expected, atol, layout="contiguous"):
    for i, name in enumerate(("output", "q", "k", "v")):
        got = joined([rank[i] for rank in ranks], layout, 2)
        assert got.dtype == expected[i].dtype
        assert torch.allclose(got, expected[i], rtol=0, atol=atol), name


@METHODS
@LAYOUTS
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [2, 4])
def test_output_and_gradients_equal_those_of_the_full_sequence(
    size, shape, is_causal, layout, method
):
    options = {"is_causal": is_causal, "enable_gqa": SHAPES[shape][0] != SHAPES[shape][1]}
    values = full_sequence(shape, length=16)
    ranks = on_ranks(size, values, layout, method=method, **options)
    check(ranks, on_one_rank(values, **options), 1e-12, layout)


def num_flops(ctx, method, is_causal):
    q, k, v, _ = full_sequence(length=16)
    with FlopCounterMode(display=False) as counter:
        out = attention(
            *split_sequence((q, k, v), ctx, dim=2), ctx, method=method, is_causal=is_causal
        )
        assert out.shape[2] == 4
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("method", "layout", "is_equal"),
    [
        ("gather", "contiguous", False),
        ("ring", "contiguous", False),
        ("ulysses", "contiguous", True),
        ("gather", "head-tail", True),
        ("ring", "head-tail", True),
        ("ulysses", "head-tail", True),
    ],
)
def test_causal_attention_takes_all_ranks_equally_long(method, layout, is_equal):
    config = {"cp_layout": layout}
    with sdpa_kernel(SDPBackend.MATH):  # the other kernels of the CPU are not counted
        flops = simulate(num_flops, 4, method, True, mesh="cp=4", config=config)
        all_flops = sum(simulate(num_flops, 4, method, False, mesh="cp=4", config=config))
    assert (len(set(flops)) == 1) == is_equal
    # Everything is computed somewhere: at least the half of the scores that the mask leaves.
    assert all_flops / 2 < sum(flops) <= all_flops


@METHODS
def test_the_scale_argument_is_used(method):
    check(
        on_ranks(2, full_sequence(), scale=0.7, method=method),
        on_one_rank(full_sequence(), scale=0.7),
        1e-12,
    )


@METHODS
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.bfloat16, 0.04)])
def test_other_precisions_differ_by_their_rounding(dtype, atol, method):
    values = full_sequence("grouped", dtype, length=32)
    options = {"is_causal": True, "enable_gqa": True}
    check(on_ranks(4, values, method=method, **options), on_one_rank(values, **options), atol)


@METHODS
def test_scores_that_would_overflow_do_not(method):
    values = [100 * x for x in full_sequence()]
    ranks, expected = (
        on_ranks(2, values, is_causal=True, method=method),
        on_one_rank(values, is_causal=True),
    )
    assert all(x.isfinite().all() for x in ranks[1])
    check(ranks, expected, 1e-6)


@METHODS
def test_queries_of_another_length_attend_to_all_keys(method):
    q, k, v, _ = full_sequence()
    values = [q[:, :, :4], k, v, q[:, :, :4]]
    check(on_ranks(2, values, method=method), on_one_rank(values), 1e-12)


@METHODS
def test_under_autocast_it_computes_in_the_dtype_of_torchs_function(method):
    def run(ctx):
        with torch.autocast("cpu", torch.bfloat16):
            call = F.scaled_dot_product_attention if ctx.world_size == 1 else functools.partial(
                attention, ctx=ctx, method=method)  # fmt: skip
            q, k, v, _ = split_sequence(tuple(full_sequence(dtype=torch.float32)), ctx, dim=2)
            return call(q, k.bfloat16(), v)

    together = torch.cat(simulate(run, 2, mesh="cp=2"), 2)
    alone = run(fake_context(0, 1))
    assert together.dtype == alone.dtype == torch.bfloat16
    assert torch.allclose(together, alone, rtol=0, atol=0.02)


def test_a_ring_receives_one_chunk_at_a_time():
    def run(ctx, method):
        return attend(ctx, functools.partial(attention, ctx=ctx, method=method), full_sequence())

    num_bytes = 2 * 4 * 2 * (8 + 8) * 8  # keys and values of two of the eight places
    ring = {(event.op, event.num_bytes) for event in simulate(run, 4, "ring", mesh="cp=4").trace}
    assert ring == {("broadcast", num_bytes), ("all_reduce", num_bytes)}
    calls = [
        (event.op, event.num_bytes // num_bytes)
        for event in simulate(run, 4, "gather", mesh="cp=4").trace
    ]
    assert sorted(calls) == [("all_gather", 1)] * 4 + [("all_to_all", 4)] * 4
    # Forward and backward: queries, keys and values in one exchange, the output in another one.
    exchanges = [
        (event.op, event.num_bytes) for event in simulate(run, 4, "ulysses", mesh="cp=4").trace
    ]
    expected = [("all_to_all", num_bytes // 2), ("all_to_all", 3 * num_bytes // 2)] * 8
    assert sorted(exchanges) == sorted(expected)


@METHODS
def test_without_gradients_nothing_is_exchanged_backward(method):
    def run(ctx):
        q, k, v, _ = split_sequence(tuple(full_sequence()), ctx, dim=2)
        return attention(q, k, v, ctx, is_causal=True, method=method).requires_grad

    out = simulate(run, 2, mesh="cp=2")
    assert out == (False, False)
    expected = {"gather": "all_gather", "ring": "broadcast", "ulysses": "all_to_all"}
    assert {event.op for event in out.trace} == {expected[method]}


def test_one_rank_calls_torchs_function():
    expected = on_one_rank(full_sequence(), is_causal=True)
    ctx = fake_context(0, 1)
    got = attend(
        ctx, functools.partial(attention, ctx=ctx, method="ring"), full_sequence(), is_causal=True
    )
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    x = torch.ones(3, 4, 8)  # a shape that torch takes
    assert attention(x, x, x, ctx).shape == x.shape


class Placed(Embed):
    """Takes the places of its tokens in the sequence, instead of counting from 0."""

    def forward(self, tokens, positions):
        return self.token(tokens) + self.position[positions]


class PlacedModel(CharModel):
    """The model of the other tests, whose attention has no code for context parallel."""

    def __init__(self):
        super().__init__(tied=False)
        self.embed = Placed()
        self.head.weight = self.embed.token.weight

    def forward(self, tokens, positions):
        x = self.embed(tokens, positions)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def train(ctx, method="gather", again=False, steps=2):
    """The parameters after steps on 8 sequences; a rank has its rows and its chunk."""
    torch.manual_seed(3)
    options = {"plan": faccel.Plan(activation_checkpoint="full")} if again else {}
    model = faccel.wrap(PlacedModel().double(), ctx, **options)
    opt = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scaler, losses = faccel.init_scaler(ctx), []
    for seed in range(steps):
        text = faccel.split(tokens(8, seed), ctx)
        batch = {"x": text[:, :-1], "y": text[:, 1:], "positions": torch.arange(LENGTH)[None]}
        chunk = split_sequence(batch, ctx)
        with context_parallel(ctx, method=method):
            loss = loss_of(model(chunk["x"], chunk["positions"]), chunk["y"])
            scaler = faccel.scaled_backward(loss, scaler, ctx)
        _, scaler = faccel.optimizer_step(opt, scaler, ctx, clip_norm=1.0)
        losses.append(faccel.reduce(loss, ctx, op="mean", axis="world"))
    values = {
        n: (p.full_tensor() if isinstance(p, DTensor) else p).detach()
        for n, p in model.named_parameters()
    }
    return values, losses


@functools.cache
def reference():
    return train(fake_context(0, 1))


def check_trained(ranks):
    values, losses = reference()
    for got, seen in ranks:
        assert torch.allclose(torch.stack(seen), torch.stack(losses), rtol=0, atol=1e-12)
        for name, p in values.items():
            assert torch.allclose(got[name], p, rtol=0, atol=1e-10), name


@METHODS
@pytest.mark.parametrize("mesh", ["cp=2", "cp=4", "dp_shard=2,cp=2", "dp_replicate=2,cp=2"])
def test_a_model_without_context_parallel_code_trains_as_one_process_does(mesh, method):
    size = faccel.MeshSpec.of(mesh).size
    check_trained(simulate(train, size, method, mesh=mesh))


@METHODS
def test_a_model_trains_equally_with_two_pieces_per_rank(method):
    config = {"cp_layout": "head-tail"}
    check_trained(simulate(train, 4, method, mesh="dp_shard=2,cp=2", config=config))


@METHODS
def test_activation_checkpointing_does_not_change_the_result(method):
    check_trained(simulate(train, 2, method, True, mesh="cp=2"))


def test_positions_that_start_over_in_each_chunk_train_another_model():
    def run(ctx):
        chunk = split_sequence(tokens(2)[:, :-1], ctx)
        torch.manual_seed(3)
        model = PlacedModel().double()
        with context_parallel(ctx), torch.no_grad():
            right = model(chunk, split_sequence(torch.arange(LENGTH)[None], ctx))
            return right, model(chunk, torch.arange(chunk.shape[1])[None])

    (first, same), (last, other) = simulate(run, 2, mesh="cp=2")
    assert torch.equal(first, same)
    assert not torch.allclose(last, other, atol=1e-3)


def test_nested_contexts_and_attention_communicate_once():
    def run(ctx):
        with context_parallel(ctx), context_parallel(ctx):
            return attend(
                ctx, functools.partial(attention, ctx=ctx), full_sequence(), is_causal=True
            )

    check(simulate(run, 2, mesh="cp=2"), on_one_rank(full_sequence(), is_causal=True), 1e-12)


def test_torchs_function_is_restored_afterwards():
    def run(ctx):
        x = torch.full((1, 1, 2, 4), float(ctx.rank))
        with context_parallel(ctx):
            inside = F.scaled_dot_product_attention(x, x, x)
        return inside.mean().item(), F.scaled_dot_product_attention(x, x, x).mean().item()

    first, second = simulate(run, 2, mesh="cp=2")
    assert first == (0.5, 0.0)
    assert second[0] > 0.5
    assert second[1] == 1.0


def checkpointed_grad(ctx, method="gather", inside=True):
    def forward(q):
        return F.scaled_dot_product_attention(q, 2 * q, 3 * q, is_causal=True)

    values = full_sequence()[0]
    chunk = split_sequence(values, ctx, dim=2).clone().requires_grad_()
    with context_parallel(ctx, method=method):
        out = checkpoint(forward, chunk, use_reentrant=False)
        if inside:
            out.backward(torch.ones_like(out))
    if not inside:
        out.sum().backward()
    return chunk.grad


@METHODS
def test_backward_of_a_tensor_checkpoints_inside_the_context(method):
    together = torch.cat(simulate(checkpointed_grad, 2, method, mesh="cp=2"), 2)
    assert torch.allclose(together, checkpointed_grad(fake_context(0, 1)), rtol=0, atol=1e-12)


@METHODS
def test_checkpointed_backward_outside_the_context_is_an_error(method):
    with pytest.raises(CheckpointError):
        simulate(checkpointed_grad, 2, method, False, mesh="cp=2")


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_attention_is_an_error():
    x = torch.ones(1, 2, 16, 16)

    def run(ctx):
        with context_parallel(ctx), torch.no_grad():
            flex_attention(x, x, x)

    with pytest.raises((ModelError, Unsupported), match="flex_attention"):
        simulate(run, 2, mesh="cp=2")


def test_each_tensor_of_a_tree_is_split():
    x = {"tokens": torch.arange(8).view(1, 8), "more": (torch.arange(16).view(2, 4, 2),)}
    for rank in range(4):
        chunk = split_sequence(x, fake_context(rank, 4, mesh="cp=4"))
        assert chunk["tokens"].tolist() == [[2 * rank, 2 * rank + 1]]
        assert torch.equal(chunk["more"][0], x["more"][0][:, rank : rank + 1])
    ctx = fake_context(3, 4, mesh="dp_shard=2,cp=2")
    assert split_sequence(torch.arange(4), ctx, dim=-1).tolist() == [2, 3]
    strings = ["not", "a", "tensor"]
    assert split_sequence(strings, fake_context(0, 2, mesh="dp_shard=2")) is strings


def test_a_chunk_of_two_pieces_is_one_of_the_start_and_one_of_the_end():
    def run(ctx):
        return split_sequence(torch.arange(16).view(2, 8), ctx).tolist()

    config = {"cp_layout": "head-tail"}
    assert simulate(run, 2, mesh="cp=2", config=config) == (
        [[0, 1, 6, 7], [8, 9, 14, 15]],
        [[2, 3, 4, 5], [10, 11, 12, 13]],
    )
    with pytest.raises(DataError, match="not a multiple of 8, two pieces") as caught:
        split_sequence(torch.ones(1, 12), fake_context(0, 4, mesh="cp=4", config=config))
    assert "cut it to 8" in caught.value.fix
    assert "to 16" in caught.value.fix


@pytest.mark.parametrize(
    ("x", "dim", "error", "words"),
    [
        (
            {"a": torch.ones(2, 4), "b": torch.ones(2, 6)},
            1,
            DataError,
            ["length 6 of `['b']`", "cut it to 4", "to 8"],
        ),
        (
            {"a": torch.ones(2, 4), "b": torch.ones(4)},
            1,
            DataError,
            ["`['b']` of shape [4]", "dim 1", "`dim=`"],
        ),
        (torch.ones(2, 4), -3, DataError, ["dim -3"]),
        ({"a": [1, 2]}, 1, TreeError, ["`['a'][0]`, a int", "tensors"]),
    ],
)
def test_an_invalid_tensor_to_split_is_named(x, dim, error, words):
    with pytest.raises(error) as caught:
        split_sequence(x, fake_context(0, 4, mesh="cp=4"), dim=dim)
    assert all(word in str(caught.value) for word in words), caught.value
    assert caught.value.got
    assert caught.value.fix


def q(*shape, dtype=torch.float32):
    return torch.ones(shape, dtype=dtype)


def masked(ctx, **options):
    with context_parallel(ctx):
        return F.scaled_dot_product_attention(
            q(1, 2, 4, 8), q(1, 2, 4, 8), q(1, 2, 4, 8), **options
        )


def local(ctx, net, *args):
    with context_parallel(ctx), torch.no_grad():
        return net(*args)


x = q(1, 2, 4, 8)
MISTAKES = {
    "heads of keys": (
        lambda ctx: attention(q(1, 4, 4, 8), x, x, ctx),
        ModelError,
        "`enable_gqa=True`",
    ),
    "heads of ulysses": (
        lambda ctx: attention(*[q(1, 3, 4, 8)] * 3, ctx, method="ulysses"),
        ModelError,
        "`ring` or `gather`",
    ),
    "heads that do not divide": (
        lambda ctx: attention(q(1, 3, 4, 8), x, x, ctx, enable_gqa=True),
        ModelError,
        "divides 3",
    ),
    "heads of values": (
        lambda ctx: attention(x, x, q(1, 1, 4, 8), ctx),
        ModelError,
        "the same batch, heads",
    ),
    "batch": (lambda ctx: attention(q(2, 2, 4, 8), x, x, ctx), ModelError, "the batch and width"),
    "width": (lambda ctx: attention(q(1, 2, 4, 6), x, x, ctx), ModelError, "the batch and width"),
    "dimensions": (lambda ctx: attention(q(2, 4, 8), x, x, ctx), ModelError, "unsqueeze(1)"),
    "dtype": (lambda ctx: attention(x.double(), x, x, ctx), ModelError, "one dtype"),
    "causal lengths": (
        lambda ctx: attention(q(1, 2, 2, 8), x, x, ctx, is_causal=True),
        ModelError,
        "is_causal=False",
    ),
    "method": (lambda ctx: attention(x, x, x, ctx, method="rings"), ConfigError, "`ring`"),
    "method of the context": (
        lambda ctx: context_parallel(ctx, method="gathered"),
        ConfigError,
        "`gather`",
    ),
    "mask": (lambda ctx: masked(ctx, attn_mask=q(4, 4)), ModelError, "`is_causal=True`"),
    "dropout": (lambda ctx: masked(ctx, dropout_p=0.1), ModelError, "set the dropout"),
    "torch's module": (
        lambda ctx: local(ctx, nn.MultiheadAttention(8, 2), *[q(1, 4, 8)] * 3),
        ModelError,
        "`multi_head_attention_forward`",
    ),
    "torch's fast path": (
        lambda ctx: local(
            ctx, nn.TransformerEncoderLayer(8, 2, batch_first=True).eval(), q(1, 4, 8)
        ),
        ModelError,
        "F.scaled_dot_product_attention",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_an_error_with_a_fix(mistake):
    call, error, words = MISTAKES[mistake]
    with pytest.raises(error) as caught:
        simulate(call, 2, mesh="cp=2")
    assert words in str(caught.value)
    assert caught.value.got
    assert caught.value.fix


def test_ranks_with_chunks_of_different_lengths_are_an_error():
    def run(ctx):
        chunk = q(1, 2, 4 + ctx.rank, 8)
        return attention(chunk, chunk, chunk, ctx)

    with pytest.raises(faccel.errors.DesyncError):
        simulate(run, 2, mesh="cp=2", config={"debug": True})
