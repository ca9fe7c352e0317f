"""`forward_backward` equals the loop that it replaces, on every mesh."""

import pytest
import torch
from torch.utils.data import DataLoader

import faccel
from faccel.errors import DataError, FaccelError, ModelError, RankFailedError
from faccel.testing import simulate
from tests.models import loss_of, model, tokens
from tests.training import full, plan_of

ROWS, SIZE = 16, 4
pytestmark = pytest.mark.filterwarnings("ignore")  # advice of torch on layouts


def loss_fn(net, batch):
    rows = batch.data[: batch.num_valid]
    return loss_of(net(rows[:, :-1]), rows[:, 1:]) * batch.num_valid


def with_aux(net, batch):
    loss = loss_fn(net, batch)
    return loss, {"twice": 2 * loss, "rows": batch.num_valid}


def num_rows(batch):
    return batch.num_valid


def first_window(ctx, *, num=ROWS, weight=num_rows):
    loader = faccel.shard(DataLoader(tokens(num), ROWS // SIZE // ctx.data_world_size), ctx)
    return next(faccel.windows(loader, ctx, size=SIZE, weight=weight))


def wrapped_model(ctx, mesh):
    return faccel.wrap(model(torch.float64, depth=1), ctx, plan=plan_of(mesh))


def gradients(net):
    return {name: full(p.grad) for name, p in net.named_parameters() if p.grad is not None}


def run(ctx, mesh, fn=loss_fn, **options):
    net = wrapped_model(ctx, mesh)
    scaler = faccel.init_scaler(ctx)
    result, scaler = faccel.forward_backward(fn, net, first_window(ctx), scaler, ctx, **options)
    return result, gradients(net)


def run_by_hand(ctx, mesh):
    net, scaler, losses = wrapped_model(ctx, mesh), faccel.init_scaler(ctx), []
    for micro in first_window(ctx):
        with faccel.grad_sync(net, on=micro.sync):
            loss = loss_fn(net, micro)
            scaler = faccel.scaled_backward(loss, scaler, ctx, scale=micro.scale)
        losses.append(full(loss.detach()))
    return torch.stack(losses), gradients(net)


@pytest.mark.parametrize("mesh", ["dp_replicate=1", "dp_replicate=2", "dp_shard=2", "tp=2"])
def test_it_is_bit_for_bit_the_loop_written_by_hand(mesh):
    world_size = faccel.MeshSpec.of(mesh).size
    by_hand = simulate(run_by_hand, world_size, mesh, mesh=mesh)
    for (losses, grads), (expected, expected_grads) in zip(
        simulate(run, world_size, mesh, mesh=mesh), by_hand, strict=True
    ):
        assert torch.equal(losses, expected)
        assert grads.keys() == expected_grads.keys()
        assert all(torch.equal(grads[name], expected_grads[name]) for name in grads)


@pytest.mark.parametrize(
    "mesh", ["dp_replicate=2", "dp_shard=2", "tp=2", "pp=2", "pp=2,dp_shard=2"]
)
def test_losses_and_auxiliary_values_are_those_of_one_process(mesh):
    def fn(ctx):
        (losses, auxs), _ = run(ctx, mesh, with_aux, has_aux=True)
        return ctx.data_rank, losses, auxs

    ((expected, _),) = simulate(run, 1, "dp_replicate=1")
    losses_of = {}
    for data_rank, losses, auxs in simulate(fn, faccel.MeshSpec.of(mesh).size, mesh=mesh):
        losses_of[data_rank] = losses
        num_rows_here = ROWS // SIZE // faccel.MeshSpec.of(mesh).data_world_size
        assert [aux["rows"] for aux in auxs] == [num_rows_here] * SIZE
        assert not any(aux["twice"].requires_grad for aux in auxs)
        assert torch.equal(torch.stack([full(aux["twice"]) for aux in auxs]), 2 * losses)
    assert torch.allclose(sum(losses_of.values()), expected, atol=1e-12)


CHAIN = faccel.Plan(pipeline=faccel.parallel.PipelineConfig(chain=("0", "1", "2")))


def pipelined(ctx, fn):
    net = torch.nn.Sequential(*(torch.nn.Linear(3, 3) for _ in range(3)))
    net = faccel.wrap(net, ctx, plan=CHAIN)
    window = next(faccel.windows(faccel.shard(DataLoader(torch.ones(8, 3), 2), ctx), ctx, size=4))
    return faccel.forward_backward(fn, net, window, faccel.init_scaler(ctx), ctx)


def test_a_pipeline_runs_a_loss_function_once_where_it_is_needed():
    def fn(ctx):
        moments = []

        def square(net, batch):
            moments.append("begin")
            loss = net(batch.data).square().mean()
            moments.append("end")
            return loss

        pipelined(ctx, square)
        return moments

    first, middle, last = simulate(fn, 3, mesh="pp=3")
    assert (first, middle, last) == (["begin"] * 4, [], ["begin", "end"] * 4)


def test_an_exception_before_the_call_is_an_error_on_every_rank_of_a_pipeline():
    def fails(net, batch):
        raise ValueError("no such column")

    def fn(ctx):
        # the rank that runs the function raises its exception, the others name it
        error = ValueError if ctx.rank == 0 else RankFailedError
        with pytest.raises(error, match="no such column"):
            pipelined(ctx, fails)
        return True

    assert all(simulate(fn, 3, mesh="pp=3"))


def test_an_exception_of_the_model_call_cannot_be_caught_by_the_loss_function():
    def fn(ctx):
        def tolerant(net, batch):
            try:
                return net(batch.data).square().mean()
            except Exception:
                return net(0 * batch.data).mean()

        return pipelined(ctx, tolerant)[0]

    def plain(ctx):
        return pipelined(ctx, lambda net, batch: net(batch.data).square().mean())[0]

    expected = simulate(plain, 3, mesh="pp=3")
    assert all(map(torch.equal, simulate(fn, 3, mesh="pp=3"), expected))


MISTAKES = {
    "data": (lambda net, batch: net(batch.data).mean(), {"window": [1, 2]}, DataError, "windows"),
    "tuple": (lambda net, batch: (net(batch.data).mean(), 1), {}, ModelError, "has_aux=True"),
    "no aux": (lambda net, batch: net(batch.data).mean(), {"has_aux": True}, ModelError, "aux"),
    "no scalar": (lambda net, batch: net(batch.data), {}, ModelError, "scalar"),
    "detached": (lambda net, batch: net(batch.data).mean().item(), {}, ModelError, "scalar"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_raises_with_a_fix(name):
    fn, options, error, words = MISTAKES[name]

    def call(ctx):
        net = faccel.wrap(torch.nn.Linear(3, 3), ctx)
        loader = faccel.shard(DataLoader(torch.ones(8, 3), 2), ctx)
        window = options.get("window") or next(faccel.windows(loader, ctx, size=4))
        aux = {key: value for key, value in options.items() if key != "window"}
        faccel.forward_backward(fn, net, window, faccel.init_scaler(ctx), ctx, **aux)

    with pytest.raises(error, match=words):
        simulate(call, 1)


@pytest.mark.parametrize("num_calls", [0, 2])
def test_a_loss_function_calls_the_model_of_a_pipeline_once(num_calls):
    def fn(net, batch):
        outputs = [net(batch.data) for _ in range(num_calls)]
        return sum(output.mean() for output in outputs) + torch.ones(1, requires_grad=True)

    with pytest.raises(FaccelError, match=r"call its model once|no call|2 calls"):
        simulate(pipelined, 3, fn, mesh="pp=3")
