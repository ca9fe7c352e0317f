"""`windows`: gradient accumulation with weights, sizes, short last windows and early ends."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

import faccel
from faccel.errors import ConfigError, DataError
from faccel.testing import fake_context, selftest, simulate

PAD = -100


def sentences(n):
    """Token rows of ragged lengths; every third one has no token that counts."""
    draw = torch.Generator().manual_seed(n)
    rows = []
    for i in range(n):
        length = int(torch.randint(1, 7, (), generator=draw))
        x = torch.randn(8, 3, dtype=torch.float64, generator=draw)
        labels = torch.full((8,), PAD)
        if i % 3:
            labels[:length] = torch.randint(0, 5, (length,), generator=draw)
        rows.append({"x": x, "labels": labels})
    return rows


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5)).double()


def summed_loss(model, data, num_valid):
    logits, labels = model(data["x"])[:num_valid], data["labels"][:num_valid]
    return F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=PAD, reduction="sum"
    )


def num_tokens(batch):
    return (batch.data["labels"][: batch.num_valid] != PAD).sum()


def gradients_per_window(ctx, rows, batch_size, size):
    loader = faccel.shard(DataLoader(rows, batch_size), ctx)
    model = faccel.wrap(net(), ctx)
    scaler, out = faccel.init_scaler(ctx), []
    for window in faccel.windows(loader, ctx, size=size, weight=num_tokens):
        for micro in window:
            with faccel.grad_sync(model, on=micro.sync):
                loss = summed_loss(model, micro.data, micro.num_valid)
                scaler = faccel.scaled_backward(loss, scaler, ctx, scale=micro.scale)
        out.append((window.cursor, [p.grad.clone() for p in model.parameters()]))
        unwrapped = faccel.unwrap(model)
        unwrapped.zero_grad()
    return out


def reference(rows):
    """Gradients of the mean over all tokens of `rows`, in plain torch."""
    model = net()
    x, labels = torch.stack([r["x"] for r in rows]), torch.stack([r["labels"] for r in rows])
    count = (labels != PAD).sum()
    loss = F.cross_entropy(
        model(x).flatten(0, 1), labels.flatten(), ignore_index=PAD, reduction="sum"
    )
    (loss / count if count else loss * 0).backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize(("world_size", "size"), list(itertools.product((1, 2, 3), (1, 2, 4))))
@pytest.mark.parametrize("n", [1, 13, 25])
def test_token_weighted_windows_equal_plain_torch_on_the_full_batch(world_size, size, n):
    batch_size = 12 // world_size // 2
    results = simulate(gradients_per_window, world_size, sentences(n), batch_size, size)
    per_window = batch_size * world_size * size
    assert len(results[0]) == -(-n // per_window)
    for rank in results:
        for i, (_, grads) in enumerate(rank):
            for got, want in zip(
                grads, reference(sentences(n)[i * per_window : (i + 1) * per_window]), strict=True
            ):
                assert torch.allclose(got, want, rtol=0, atol=1e-12)


def test_a_window_without_a_token_changes_nothing():
    [(_, grads)] = simulate(gradients_per_window, 1, sentences(1), 2, 1)[0]
    assert all((g == 0).all() for g in grads)


def test_one_small_all_reduce_per_window_and_one_gradient_reduction():
    trace = simulate(gradients_per_window, 2, sentences(16), 2, 2).trace
    gradients = 8 * sum(p.numel() for p in net().parameters())
    assert [e.num_bytes for e in trace if e.rank == 0 and e.op == "all_reduce"] == [
        8,
        gradients,
        8,
        gradients,
    ]


def test_without_a_weight_each_micro_batch_counts_the_same():
    loader = faccel.shard(DataLoader(range(7), 2), fake_context(0, 1))
    windows = list(faccel.windows(loader, loader.ctx, size=3))
    assert [(len(w), w.scale) for w in windows] == [(3, 1 / 3), (1, 1.0)]
    assert [w.cursor for w in windows] == [faccel.Cursor(0, 6), faccel.Cursor(1, 0)]


def test_the_configuration_gives_the_size():
    ctx = fake_context(0, 1, config={"grad_accum": 2})
    loader = faccel.shard(DataLoader(range(8), 2), ctx)
    assert [len(w) for w in faccel.windows(loader, ctx)] == [2, 2]


def test_each_consumed_micro_batch_reads_one_batch_ahead():
    read = []
    loader = faccel.shard(DataLoader(range(12), 1, collate_fn=read.extend), fake_context(0, 1))
    windows = faccel.windows(loader, loader.ctx, size=3)
    first = next(windows)
    assert read == [0, 1, 2]
    micros = iter(first)
    next(micros)
    assert read == [0, 1, 2]
    next(micros)
    assert read == [0, 1, 2, 3]
    assert len(next(windows)) == 3  # the rest of the first window was not looked at
    assert read == [0, 1, 2, 3, 4, 5]


def test_a_window_that_is_left_early_does_not_shift_the_next():
    loader = faccel.shard(DataLoader(range(9), 1), fake_context(0, 1))
    seen = []
    for window in faccel.windows(loader, loader.ctx, size=3):
        for micro in window:
            seen.append(int(micro.data))
            break
    assert seen == [0, 3, 6]


def test_a_window_that_is_iterated_late_loses_nothing():
    loader = faccel.shard(DataLoader(range(12), 1), fake_context(0, 1))
    windows, seen = faccel.windows(loader, loader.ctx, size=2), []
    late = next(windows)
    for window in windows:
        seen += [int(m.data) for m in late]
        late = window
    seen += [int(m.data) for m in late]
    assert seen == list(range(12))


def test_weights_may_be_numbers_and_tensors():
    for one in (2, 2.0, torch.tensor(2)):
        loader = faccel.shard(DataLoader(range(4), 2), fake_context(0, 1))
        (window,) = faccel.windows(loader, loader.ctx, size=2, weight=lambda b, one=one: one)
        assert window.scale.item() == 0.25


def test_windows_raises_for_a_size_of_0_and_an_uneven_tail():
    ctx = fake_context(0, 2)
    with pytest.raises(DataError, match="uneven"):
        faccel.windows(faccel.shard(DataLoader(range(9), 1), ctx, tail="uneven"), ctx)
    with pytest.raises(ConfigError):
        faccel.windows(faccel.shard(DataLoader(range(9), 1), ctx), ctx, size=0)


ACCUMULATE = {
    "argument": {"overrides": {"grad_accum": 3}, "env": {}},
    "variable": {"env": {"FACCEL_GRAD_ACCUM": "3"}},
}


def configured(source):
    options = ACCUMULATE[source]
    return faccel.init(device="cpu", env=options["env"], **options.get("overrides", {}))


def number_loader(ctx, n=8):
    return faccel.shard(DataLoader(torch.arange(float(n)), 1), ctx)


@pytest.mark.parametrize("source", ACCUMULATE)
def test_a_size_that_contradicts_the_configuration_is_an_error(source):
    with configured(source) as ctx:
        with pytest.raises(ConfigError, match="size=4, grad_accum=3") as caught:
            faccel.windows(number_loader(ctx), ctx, size=4)
        assert ("FACCEL_GRAD_ACCUM" in caught.value.got) == (source == "variable")
        for window_size in (None, 3):
            windows = faccel.windows(number_loader(ctx), ctx, size=window_size)
            assert [len(window) for window in windows] == [3, 3, 2]


def test_a_configured_1_contradicts_another_size_and_the_default_does_not():
    ctx = fake_context(0, 1, config={"grad_accum": 1})
    with pytest.raises(ConfigError, match="size=4, grad_accum=1"):
        faccel.windows(number_loader(ctx), ctx, size=4)
    with faccel.init(device="cpu", env={}) as ctx:
        assert len(next(faccel.windows(number_loader(ctx), ctx, size=4))) == 4


def update_after(ctx, counts, num_optimizers=1):
    """Train with `counts[i]` backwards before update i; return how many updates there were."""
    model = faccel.wrap(torch.nn.Linear(1, 1), ctx)
    opts = [torch.optim.SGD([param], lr=0.1) for param in model.parameters()][:num_optimizers]
    scaler = faccel.init_scaler(ctx)
    for num_updates, count in enumerate(counts):
        for _ in range(count):
            loss = model(torch.ones(1, 1)).mean()
            scaler = faccel.scaled_backward(loss, scaler, ctx, scale=1 / count)
        before = model.weight.detach().clone()
        try:
            for opt in opts:
                _, scaler = faccel.optimizer_step(opt, scaler, ctx)
        except ConfigError as error:
            assert "`grad_accum` is configured" in error.problem
            assert f"grad_accum={ctx.config.grad_accum}, and {count} backward" in error.got
            assert torch.equal(model.weight, before)
            return num_updates
    return len(counts)


LOOPS = {
    "an update after every backward": (3, [1, 1], 1, 0),
    "two losses per update": (3, [2, 2], 1, 0),
    "accumulated by hand": (3, [3, 3, 3], 1, 3),
    "a short end of the epoch": (3, [3, 3, 1, 3], 1, 4),
    "more backwards than micro-batches": (3, [6, 6], 1, 2),
    "two optimizers": (3, [3, 3], 2, 2),
    "no accumulation is configured": (1, [1, 3, 1], 1, 3),
}


@pytest.mark.parametrize("mesh", [None, "dp_replicate=2", "dp_shard=2"])
@pytest.mark.parametrize("loop", LOOPS)
def test_a_loop_that_ignores_grad_accum_raises_at_its_first_update(loop, mesh):
    grad_accum, counts, num_optimizers, expected = LOOPS[loop]
    world_size = 2 if mesh else 1
    config = {"grad_accum": grad_accum}
    got = simulate(update_after, world_size, counts, num_optimizers, mesh=mesh, config=config)
    assert got == (expected,) * world_size


def test_a_loop_with_windows_may_have_short_updates():
    def fn(ctx):
        assert len(list(faccel.windows(number_loader(ctx, 2), ctx))) == 1
        return update_after(ctx, [1, 2])

    assert simulate(fn, 2, config={"grad_accum": 3}) == (2, 2)


def test_a_functional_step_that_ignores_grad_accum_is_an_error():
    ctx = fake_context(0, 1, config={"grad_accum": 3})

    def loss_fn(params, batch, generator):
        return batch.mean()

    with pytest.raises(ConfigError, match="num_micro_batches=1, grad_accum=3"):
        faccel.func.make_step(loss_fn, faccel.func.sgd(0.1), ctx)
    faccel.func.make_step(loss_fn, faccel.func.sgd(0.1), ctx, num_micro_batches=3)


def test_the_check_of_an_installation_accumulates_as_configured():
    assert simulate(selftest.run, 2, config={"grad_accum": 2}) == (0, 0)
