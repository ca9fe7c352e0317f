"""`gather(differentiable=True)` has the values and gradients of one process."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import faccel
from faccel.comm import pad_across
from faccel.errors import DataError, TreeError
from faccel.testing import simulate
from tests.ranks import run_ranks

NUM_ROWS = 8


def inputs():
    return torch.randn(NUM_ROWS, 2, 6, generator=torch.Generator().manual_seed(0))


def contrastive_loss(a, b):
    """The cross-entropy in which each row of `a` has to find its row of `b`."""
    logits = F.normalize(a) @ F.normalize(b).T / 0.1
    return F.cross_entropy(logits, torch.arange(len(a)))


def make_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))


def expected_training(steps=3):
    """The losses and parameters of plain torch on one process."""
    net = make_net()
    opt = torch.optim.SGD(net.parameters(), lr=0.5)
    losses = []
    for _ in range(steps):
        loss = contrastive_loss(*net(inputs().flatten(0, 1)).unflatten(0, (-1, 2)).unbind(1))
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    return losses, [param.detach() for param in net.parameters()]


def full(param):
    param = param.detach()
    return param.full_tensor() if hasattr(param, "full_tensor") else param


def train(ctx, steps=3):
    model = faccel.wrap(make_net(), ctx)
    opt = faccel.wrap_optimizer(torch.optim.SGD(model.parameters(), lr=0.5), model, ctx)
    scaler = faccel.init_scaler(ctx)
    x = inputs().chunk(ctx.data_world_size)[ctx.data_rank]
    losses = []
    for _ in range(steps):
        rows = faccel.gather(model(x.flatten(0, 1)), ctx, differentiable=True)
        loss = contrastive_loss(*rows.unflatten(0, (-1, 2)).unbind(1))
        scaler = faccel.scaled_backward(loss, scaler, ctx)
        _, scaler = faccel.optimizer_step(opt, scaler, ctx)
        losses.append(loss.item())
    return losses, [full(param) for param in model.parameters()]


def assert_training_is_expected(results):
    losses, params = expected_training()
    for rank_losses, rank_params in results:
        assert rank_losses == pytest.approx(losses, abs=1e-5)
        for param, expected in zip(rank_params, params, strict=True):
            torch.testing.assert_close(param, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("world_size", "mesh"),
    [(1, None), (2, None), (4, None), (2, "dp_shard=2"), (4, "dp_replicate=2,dp_shard=2")],
)
def test_a_contrastive_loss_trains_as_on_one_process(world_size, mesh):
    assert_training_is_expected(simulate(train, world_size, mesh=mesh))


@pytest.mark.parametrize("mesh", ["dp_replicate=2", "dp_shard=2"])
def test_it_does_over_gloo(mesh):
    assert_training_is_expected(run_ranks(train, 2, mesh=mesh))


def weighted(ctx, counts, **options):
    x = (torch.arange(12.0).view(4, 3)[: options.pop("rows", 4)] + ctx.rank).requires_grad_()
    scalar = torch.tensor(2.0 + ctx.rank, requires_grad=True)
    tree = {"x": x, "s": scalar, "label": torch.full((len(x),), ctx.rank)}
    y = faccel.gather(tree, ctx, differentiable=True, **options)
    weights = torch.arange(1.0, len(y["x"]) + 1)[:, None] * (ctx.rank + 1)
    (y["x"] * weights).sum().add((y["s"] ** 2).sum() * (ctx.rank + 1)).backward()
    return y["label"].tolist(), x.grad[:, 0].tolist(), scalar.grad.item()


def test_rows_that_are_dropped_get_no_gradient():
    out = simulate(lambda ctx: weighted(ctx, None, num_valid=1 + ctx.rank), 2)
    # loss = sum_r (r + 1) * sum_i (i + 1) * y_i, of which rank 0 has row 0 and rank 1 rows 1 and 2
    assert out[0] == ([0, 1, 1], [3.0, 0.0, 0.0, 0.0], 12.0)
    assert out[1] == ([0, 1, 1], [6.0, 9.0, 0.0, 0.0], 18.0)


def test_ranks_may_have_other_numbers_of_rows():
    out = simulate(lambda ctx: weighted(ctx, None, rows=1 + 2 * ctx.rank, ragged=True), 2)
    assert out[0] == ([0, 1, 1, 1], [3.0], 12.0)
    assert out[1] == ([0, 1, 1, 1], [6.0, 9.0, 12.0], 18.0)


def test_without_the_argument_the_result_is_detached():
    x = torch.ones(2, requires_grad=True)
    assert simulate(lambda ctx: faccel.gather(x, ctx).requires_grad, 2) == (False, False)


def test_other_numbers_of_dimensions_raise_on_every_rank():
    def fn(ctx):
        with pytest.raises(DataError, match="same number of dimensions") as error:
            pad_across({"a": torch.ones([2] * (1 + ctx.rank))}, ctx)
        assert "1 to 2 dimensions" in error.value.got
        return faccel.reduce(torch.tensor(1), ctx).item()  # the world still works

    assert simulate(fn, 2) == (2, 2)
    assert run_ranks(dimensions_over_gloo, 2) == [True, True]


def dimensions_over_gloo(ctx):
    try:
        pad_across(torch.ones([2] * (1 + ctx.rank)), ctx)
    except DataError:
        return faccel.reduce(torch.tensor(1), ctx).item() == 2
    return False


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("call", [pad_across, faccel.gather, faccel.reduce])
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_are_named(call, layout):
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=layout)
    with pytest.raises(TreeError, match=r"nested|jagged"):
        simulate(lambda ctx: call({"a": nested}, ctx), 2)
