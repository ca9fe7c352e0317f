"""Training on several ranks, simulated and over gloo, equals training on one process."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import faccel
from faccel.errors import DataError, ModelError, OptimizerError
from faccel.testing import fake_context, simulate
from tests.digits import EXAMPLE, LEARNING_RATE, train_epoch
from tests.ranks import run_ranks


@functools.cache
def reference(shuffle, accumulate, dtype=torch.float32):
    return train_epoch(fake_context(0, 1), shuffle, accumulate, dtype)


def check_equal(ranks, shuffle, accumulate, dtype=torch.float32, atol=1e-5):
    parameters, predictions, updates = reference(shuffle, accumulate, dtype)
    assert updates == 15  # 1437 images in global batches of 96: nothing divides
    for got, seen, count in ranks:
        assert count == updates
        assert torch.equal(seen, predictions)
        for name, p in parameters.items():
            assert torch.allclose(got[name], p, rtol=0, atol=atol), name


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("world_size", [2, 4])
def test_simulated_ranks_train_as_one_process_does(world_size, shuffle, accumulate):
    check_equal(simulate(train_epoch, world_size, shuffle, accumulate), shuffle, accumulate)


@pytest.mark.parametrize("world_size", [3, 4, 8])
def test_in_double_precision_nothing_but_rounding_differs(world_size):
    check_equal(
        simulate(train_epoch, world_size, True, 2, torch.float64),
        True,
        2,
        torch.float64,
        atol=1e-14,
    )


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_train_as_one_process_does(world_size, shuffle, accumulate):
    check_equal(run_ranks(train_epoch, world_size, shuffle, accumulate), shuffle, accumulate)


def test_simulated_and_real_ranks_agree_to_the_bit():
    real, simulated = run_ranks(train_epoch, 2, True, 1), simulate(train_epoch, 2, True, 1)
    for name, p in real[0][0].items():
        assert torch.equal(p, simulated[0][0][name])


def raw_epoch(accumulate):
    """Plain torch with the same order, without faccel's loop."""
    ctx = fake_context(0, 1)
    train_set, _ = EXAMPLE["datasets"]()
    loader = DataLoader(train_set, 96 // accumulate, shuffle=True)
    batches = list(faccel.shard(loader, ctx, tail="full").at(3))
    torch.manual_seed(1)
    model = EXAMPLE["Net"]()
    opt = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9)
    for i in range(0, len(batches), accumulate):
        group = batches[i : i + accumulate]
        for x, y in group:
            (F.cross_entropy(model(x), y) / len(group)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad()
    return dict(model.named_parameters())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_one_process_trains_as_plain_torch_does(accumulate):
    for name, p in raw_epoch(accumulate).items():
        assert torch.allclose(reference(True, accumulate)[0][name], p, rtol=0, atol=1e-7)


def tiny():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))


def test_wrap_gives_every_rank_the_values_of_rank_0():
    def fn(ctx):
        model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        with torch.no_grad():
            model[1].running_mean += ctx.rank
        faccel.wrap(model, ctx)
        return model.state_dict()

    first, second = simulate(fn, 2)
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_a_frozen_model_can_be_wrapped():
    def fn(ctx):
        model = nn.Linear(2, 2).requires_grad_(False)
        wrapped = faccel.wrap(model, ctx)
        with faccel.grad_sync(wrapped, on=False):
            wrapped(torch.ones(1, 2))
        return model.weight

    a, b = simulate(fn, 2)
    assert torch.equal(a, b)


def test_several_models_and_optimizers_train_side_by_side():
    def fn(ctx):
        torch.manual_seed(0)
        nets = [faccel.wrap(nn.Linear(2, 1), ctx) for _ in range(2)]
        opts = [
            faccel.wrap_optimizer(torch.optim.SGD(n.parameters(), lr=0.1), n, ctx) for n in nets
        ]
        scaler, x = faccel.init_scaler(ctx), torch.full((1, 2), float(ctx.rank))
        scaler = faccel.scaled_backward((nets[0](x) * nets[1](x)).sum(), scaler, ctx)
        for opt in opts:
            _, scaler = faccel.optimizer_step(opt, scaler, ctx)
        return [p.detach() for n in nets for p in n.parameters()]

    a, b = simulate(fn, 2)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("outer", [True, False])
@pytest.mark.parametrize("inner", [True, False])
def test_grad_sync_is_restored_in_both_directions(outer, inner):
    def fn(ctx):
        model = faccel.wrap(nn.Linear(1, 1, bias=False), ctx)

        def gradient():
            faccel.scaled_backward(
                model(torch.full((1, 1), float(ctx.rank))).sum(), faccel.init_scaler(ctx), ctx
            )
            value = model.module.weight.grad.item()
            model.module.zero_grad()
            return value

        with faccel.grad_sync(model, on=outer):
            with faccel.grad_sync(model, on=inner):
                first = gradient()
            second = gradient()
        return first, second, gradient()

    ranks = simulate(fn, 2)
    for number, on in enumerate((inner, outer, True)):
        assert [r[number] for r in ranks] == ([0.5, 0.5] if on else [0.0, 1.0])


def test_evaluation_is_not_collective():
    def fn(ctx):
        model = faccel.wrap(tiny(), ctx)
        model.eval()
        with torch.no_grad():
            for _ in range(ctx.rank):
                model(torch.ones(2, 2))

    trace = simulate(fn, 3).trace
    assert {e.op for e in trace} <= {"all_gather", "broadcast"}  # those of wrap


def test_every_rank_evaluates_the_same_statistics():
    def fn(ctx):
        model = faccel.wrap(tiny(), ctx)
        x = torch.randn(4, 2, generator=faccel.random.generator(ctx.rank))
        faccel.scaled_backward(model(x).sum(), faccel.init_scaler(ctx), ctx)
        assert model.eval() is model
        with torch.no_grad():
            return model(torch.ones(3, 2)), model.module[1].running_mean

    a, b = simulate(fn, 2)
    assert torch.equal(a[0], b[0])
    assert torch.equal(a[1], b[1])


def test_a_method_through_call_reduces_gradients_and_casts_its_output():
    class Encoder(nn.Linear):
        def encode(self, x):
            return self(x)

    def fn(ctx):
        model = faccel.wrap(Encoder(1, 1, bias=False), ctx)
        assert model.encode == model.module.encode  # reading returns the plain attribute
        out = model.call("encode", torch.full((1, 1), float(ctx.rank)))
        faccel.scaled_backward(out.sum(), faccel.init_scaler(ctx), ctx)
        model.zero_grad()
        faccel.scaled_backward(
            model.forward(torch.full((1, 1), float(ctx.rank))).sum(), faccel.init_scaler(ctx), ctx
        )
        assert model.to("cpu") is model.module
        return model.weight.grad.item(), out.dtype

    assert simulate(fn, 2) == ((0.5, torch.float32),) * 2
    assert simulate(fn, 2, config={"mixed_precision": "bf16"})[0][1] == torch.float32


def test_unfreezing_after_wrap_is_an_error():
    def fn(ctx):
        model = faccel.wrap(nn.Linear(1, 1).requires_grad_(False), ctx)
        model.requires_grad_(True)
        with faccel.grad_sync(model, on=False):
            assert "require_backward_grad_sync" not in vars(model.module)
        model(torch.ones(1, 1))

    with pytest.raises(ModelError, match="frozen when it was wrapped"):
        simulate(fn, 2)


def test_a_method_other_than_forward_is_reduced_too():
    class Twice(nn.Linear):
        def double(self, x, *, times):
            return self(x) * times

    def fn(ctx):
        model = faccel.wrap(Twice(1, 1, bias=False), ctx)
        out = model.call("double", torch.full((1, 1), float(ctx.rank)), times=2)
        faccel.scaled_backward(out.sum(), faccel.init_scaler(ctx), ctx)
        return model.weight.grad.item()

    assert simulate(fn, 2) == (1.0, 1.0)


def test_training_on_an_uneven_tail_is_an_error_on_every_rank_not_a_hang():
    seen = []

    def fn(ctx):
        data = TensorDataset(torch.ones(5, 2), torch.ones(5, 1))
        loader = faccel.shard(DataLoader(data, 2), ctx, tail="uneven")
        model = faccel.wrap(tiny(), ctx)
        scaler = faccel.init_scaler(ctx)
        try:
            for x, y in loader:
                scaler = faccel.scaled_backward(F.mse_loss(model(x), y), scaler, ctx)
        except DataError as error:
            seen.append((ctx.rank, error.fix))
            raise

    with pytest.raises(DataError, match='tail="pad"'):
        simulate(fn, 2)
    assert sorted(rank for rank, _ in seen) == [0, 1]


def test_evaluating_on_an_uneven_tail_inside_a_training_loop_is_fine():
    def fn(ctx):
        data = TensorDataset(torch.ones(5, 2), torch.ones(5, 1))
        # Batch norm needs more than the one row that `tail="pad"` leaves for the last step.
        train = faccel.shard(DataLoader(data, 2), ctx, tail="full")
        test = faccel.shard(DataLoader(data, 2), ctx, tail="uneven")
        model, scaler = faccel.wrap(tiny(), ctx), faccel.init_scaler(ctx)
        for x, y in train:
            scaler = faccel.scaled_backward(F.mse_loss(model(x), y), scaler, ctx)
            model.eval()
            with torch.no_grad():
                for z, _ in test:
                    model(z)
                    break
            model.train()
        return len(test)

    assert simulate(fn, 2) == (2, 1)


def test_an_optimizer_of_another_model_is_an_error():
    ctx = fake_context(0, 1)
    with pytest.raises(OptimizerError, match="before `wrap`"):
        faccel.wrap_optimizer(
            torch.optim.SGD(tiny().parameters(), lr=0.1), faccel.wrap(tiny(), ctx), ctx
        )


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_trains_the_same_on_two_ranks_and_returns_fp32(precision):
    def fn(ctx, rows):
        faccel.seed_everything(0, ctx)
        model = faccel.wrap(nn.Linear(4, 1), ctx)
        opt = faccel.wrap_optimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, ctx)
        scaler = faccel.init_scaler(ctx, **({"scale": 128.0} if precision == "fp16" else {}))
        for x in faccel.shard(DataLoader(rows, 8), ctx, split_batches=True):
            out = model(x)
            assert out.dtype == torch.float32
            scaler = faccel.scaled_backward(out.pow(2).mean(), scaler, ctx)
            info, scaler = faccel.optimizer_step(opt, scaler, ctx)
            assert not info.skipped
        return model.weight.detach()

    rows = torch.randn(32, 4, generator=faccel.random.generator(0))
    config = {"mixed_precision": precision}
    one, two = simulate(fn, 1, rows, config=config), simulate(fn, 2, rows, config=config)
    assert torch.equal(two[0], two[1])
    assert torch.allclose(one[0], two[0], atol=2e-2)


def test_an_overflow_on_one_rank_is_skipped_by_all():
    def fn(ctx):
        model = faccel.wrap(nn.Linear(1, 1), ctx)
        opt = torch.optim.SGD(model.parameters(), lr=0.1)
        before = model.weight.detach().clone()
        loss = model(torch.ones(1, 1)).sum() * (float("inf") if ctx.rank else 1.0)
        scaler = faccel.scaled_backward(loss, faccel.init_scaler(ctx), ctx)
        info, scaler = faccel.optimizer_step(opt, scaler, ctx)
        return info.skipped, torch.equal(before, model.weight), scaler.scale

    assert simulate(fn, 2, config={"mixed_precision": "fp16"}) == ((True, True, 32768.0),) * 2


def test_dropout_differs_between_data_ranks_with_different_seeds():
    def fn(ctx, per_data_rank):
        faccel.seed_everything(0, ctx)
        weight = nn.Linear(3, 3).weight.detach()
        faccel.seed_everything(0, ctx, per_data_rank=per_data_rank)
        return weight, F.dropout(torch.ones(64), 0.5)

    (w0, d0), (w1, d1) = simulate(fn, 2, True)
    assert torch.equal(w0, w1)
    assert not torch.equal(d0, d1)
    (_, d0), (_, d1) = simulate(fn, 2, False)
    assert torch.equal(d0, d1)
