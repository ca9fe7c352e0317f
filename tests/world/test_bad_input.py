"""Common mistakes raise an error with a fix on every rank, and no rank waits for another."""

import pickle
import re

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import faccel
from faccel.errors import DataError, FaccelError, ModelError, OptimizerError, ScalerError
from faccel.testing import simulate

FP16 = {"mixed_precision": "fp16"}


def net(ctx, **options):
    model = faccel.wrap(nn.Linear(2, 1), ctx, **options)
    return model, faccel.wrap_optimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, ctx)


def loader(ctx, num_samples=20, **options):
    data = TensorDataset(torch.arange(float(num_samples)))
    return faccel.shard(DataLoader(data, 3, shuffle=True), ctx, **options)


def cursor_of_another_loader(ctx, **options):
    return [batch.cursor for batch in faccel.batches(loader(ctx, **options).at(1))][1]


def step_without_backward(ctx):
    model, opt = net(ctx)
    model(torch.ones(1, 2)).sum().backward()
    faccel.optimizer_step(opt, faccel.init_scaler(ctx), ctx)


def scaler_forgotten(ctx):
    model, opt = net(ctx)
    scaler = faccel.init_scaler(ctx)
    faccel.scaled_backward(model(torch.ones(1, 2)).sum(), scaler, ctx)
    faccel.optimizer_step(opt, scaler, ctx)


def scaler_forgotten_later(ctx):
    model, opt = net(ctx)
    scaler = faccel.scaled_backward(model(torch.ones(1, 2)).sum(), faccel.init_scaler(ctx), ctx)
    _, scaler = faccel.optimizer_step(opt, scaler, ctx)
    model(
        torch.ones(1, 2)
    ).sum().backward()  # gradients that were never scaled would be divided by 65536
    faccel.optimizer_step(opt, scaler, ctx)


def no_gradient(ctx):
    model, _ = net(ctx)
    other = torch.optim.SGD(nn.Linear(2, 1).parameters(), lr=0.1)
    scaler = faccel.scaled_backward(model(torch.ones(1, 2)).sum(), faccel.init_scaler(ctx), ctx)
    faccel.optimizer_step(other, scaler, ctx)


MISTAKES = {
    "a loader that cannot be iterated": (lambda ctx: faccel.shard(5, ctx), DataError, "DataLoader"),
    "a batch size that split_batches cannot divide": (
        lambda ctx: faccel.shard(DataLoader(range(9), 3), ctx, split_batches=True),
        DataError,
        r"DataLoader\(dataset, batch_size=4\)",
    ),
    "a cursor of a shorter dataset": (
        lambda ctx: loader(ctx, 30).resume(cursor_of_another_loader(ctx)),
        DataError,
        r"at\(cursor.epoch\)",
    ),
    "a cursor of another seed": (
        lambda ctx: loader(ctx, seed=1).resume(cursor_of_another_loader(ctx)),
        DataError,
        "seed",
    ),
    "a cursor after the end": (
        lambda ctx: next(iter(loader(ctx).resume(faccel.Cursor(0, 99)))),
        DataError,
        "resume",
    ),
    "a loader that is sharded already": (
        lambda ctx: faccel.shard(loader(ctx), ctx),
        DataError,
        "once",
    ),
    "split_batches of an iterable": (
        lambda ctx: faccel.shard([torch.ones(4)], ctx, split_batches=True, mode="local"),
        DataError,
        "leave `split_batches` out",
    ),
    "num_valid that is not an int": (
        lambda ctx: faccel.gather(torch.ones(3), ctx, num_valid=2.5),
        DataError,
        "num_valid=batch.num_valid",
    ),
    "a number as a cursor": (lambda ctx: loader(ctx).resume(3), DataError, "loader.at"),
    "a number as a start": (
        lambda ctx: next(loader(ctx).epochs(3, start=1)),
        DataError,
        "batch.cursor",
    ),
    "num_valid out of range": (
        lambda ctx: faccel.gather(torch.ones(2), ctx, num_valid=3),
        DataError,
        "num_valid",
    ),
    "a model without parameters": (
        lambda ctx: faccel.wrap(nn.ReLU(), ctx),
        ModelError,
        "call it without `wrap`",
    ),
    "a step without scaled_backward": (
        step_without_backward,
        ScalerError,
        "scaler = faccel.scaled_backward",
    ),
    "a forgotten scaler": (scaler_forgotten, ScalerError, "scaler = faccel.scaled_backward"),
    "no gradient": (no_gradient, OptimizerError, "scaled_backward"),
    "a loss that is a number": (
        lambda ctx: faccel.scaled_backward(0.5, faccel.init_scaler(ctx), ctx),
        ModelError,
        "tensor",
    ),
    "no scaler": (
        lambda ctx: faccel.scaled_backward(torch.ones((), requires_grad=True), None, ctx),
        ScalerError,
        "init_scaler",
    ),
    "a step with no scaler": (
        lambda ctx: faccel.optimizer_step(net(ctx)[1], None, ctx),
        ScalerError,
        "init_scaler",
    ),
    "the two results of a step as a scaler": (
        lambda ctx: faccel.scaled_backward(
            torch.ones((), requires_grad=True), (None, faccel.init_scaler(ctx)), ctx
        ),
        ScalerError,
        "info, scaler",
    ),
}


def error_of(ctx, fn, expected):
    with pytest.raises(expected) as caught:
        fn(ctx)
    assert faccel.agree(ctx, seen=True).seen  # the ranks are still in step
    return caught.value


@pytest.mark.parametrize("what", MISTAKES)
def test_every_rank_raises_with_a_fix(what):
    fn, expected, fix = MISTAKES[what]
    for error in simulate(error_of, 2, fn, expected):
        assert isinstance(error, FaccelError)
        assert error.fix
        assert re.search(fix, error.fix), error.fix


def test_gradients_that_were_not_scaled_are_not_divided():
    for error in simulate(error_of, 2, scaler_forgotten_later, ScalerError, config=FP16):
        assert "before the last step" in error.got


def test_the_start_of_an_epoch_is_a_valid_cursor_for_every_order():
    def fn(ctx):
        cursor = [batch.cursor for batch in faccel.batches(loader(ctx).at(1))][-1]
        assert cursor == faccel.Cursor(2)
        return len(loader(ctx, 30).resume(cursor))

    assert simulate(fn, 2) == (5, 5)


def test_a_cursor_of_a_stream_is_valid_for_every_seed():
    def fn(ctx):
        loader = faccel.shard([1, 2, 3, 4, 5, 6], ctx, seed=1)
        cursor = next(faccel.batches(loader)).cursor
        return list(faccel.shard([1, 2, 3, 4, 5, 6], ctx, seed=2).resume(cursor))

    assert simulate(fn, 2) == ([3, 5], [4, 6])


def test_a_scaler_does_not_confuse_optimizers_with_the_same_address():
    def fn(ctx):
        ws = [torch.nn.Parameter(torch.ones(1)) for _ in range(4)]
        scaler = faccel.scaled_backward(
            sum(w.sum() for w in ws), faccel.init_scaler(ctx, scale=8.0), ctx
        )
        for w in ws:
            _, scaler = faccel.optimizer_step(torch.optim.SGD([w], lr=0.5), scaler, ctx)
        pickled = pickle.loads(pickle.dumps(scaler))
        return [w.item() for w in ws], pickled == scaler

    assert simulate(fn, 1, config=FP16) == (([0.5] * 4, True),)
