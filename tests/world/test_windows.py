"""`windows`: gradient accumulation with weights, sizes, short last windows and early ends."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

import faccel
from faccel.errors import ConfigError, DataError
from faccel.testing import fake_context, simulate

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
