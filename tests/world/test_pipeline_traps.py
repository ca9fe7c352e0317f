"""Regressions: pipelines, tied weights and gradients without sync."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import faccel
from faccel.errors import DataError, ModelError
from faccel.testing import simulate
from tests.models import TENSOR, loss_of, model, tokens
from tests.training import CHAIN, differences, full, plan_of, train

pytestmark = pytest.mark.filterwarnings("ignore")  # advice of torch on layouts


def loader_of(ctx, data, size):
    return faccel.shard(torch.utils.data.DataLoader(data, size // ctx.data_world_size), ctx)


def loss_fn(net, batch):
    return loss_of(net(batch.data[:, :-1]), batch.data[:, 1:])


def grads_of(wrapped):
    return {name: full(p.grad) for name, p in wrapped.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("mesh", ["pp=2", "pp=2,dp_shard=2", "dp_shard=2"])
def test_gradients_of_windows_add_up_with_inference_between_them(mesh):
    def step(ctx):
        wrapped, scaler = faccel.wrap(model(), ctx, plan=plan_of(mesh)), faccel.init_scaler(ctx)
        for window in faccel.windows(loader_of(ctx, tokens(16), 4), ctx, size=2):
            _, scaler = faccel.forward_backward(loss_fn, wrapped, window, scaler, ctx)
            with torch.no_grad():
                wrapped(tokens(3)[:, :-1])
        return grads_of(wrapped)

    (one,) = simulate(step, 1)
    for grads in simulate(step, faccel.MeshSpec.of(mesh).size, mesh=mesh):
        assert grads
        assert all(
            (g - one.get(n, one["embed.token.weight"])).abs().max() < 1e-12
            for n, g in grads.items()
        )


def test_a_short_last_window_runs_and_a_window_of_weight_0_has_losses():
    def step(ctx):
        wrapped, scaler = faccel.wrap(model(), ctx, plan=plan_of("pp=2")), faccel.init_scaler(ctx)
        values = []
        for window in faccel.windows(
            loader_of(ctx, tokens(20), 4), ctx, size=4, weight=lambda batch: 0
        ):
            losses, scaler = faccel.forward_backward(loss_fn, wrapped, window, scaler, ctx)
            values += losses.tolist()
        return values

    (one,) = simulate(step, 1)
    assert len(one) == 5
    for grads in simulate(step, 2, mesh="pp=2"):
        assert all(abs(a - b) < 1e-12 for a, b in zip(grads, one, strict=True))


@pytest.mark.parametrize("num_rows", [13, 14])
def test_a_window_with_a_shorter_batch_is_an_error_and_a_full_tail_runs(num_rows):
    def step(ctx, tail):
        wrapped, scaler = faccel.wrap(model(), ctx, plan=plan_of("pp=2")), faccel.init_scaler(ctx)
        data = torch.utils.data.DataLoader(tokens(num_rows), 4)
        loader = faccel.shard(data, ctx, tail=tail)
        num_windows = 0
        for window in faccel.windows(loader, ctx, size=2):
            _, scaler = faccel.forward_backward(loss_fn, wrapped, window, scaler, ctx)
            num_windows += 1
        return num_windows

    with pytest.raises(DataError, match='tail="full"'):
        simulate(step, 2, "pad", mesh="pp=2")
    assert simulate(step, 2, "full", mesh="pp=2") == (2, 2)


def test_noise_that_a_loss_draws_is_the_same_for_inputs_and_loss():
    def step(ctx):
        torch.manual_seed(ctx.rank)
        net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)).double()
        for layer in net:
            nn.init.eye_(layer.weight)
        plan = faccel.Plan(pipeline=faccel.parallel.PipelineConfig(chain=("0", "1")))
        wrapped, scaler = faccel.wrap(net, ctx, plan=plan), faccel.init_scaler(ctx)

        def denoise(call, batch):
            noise = torch.randn_like(batch.data)
            return (call(noise) - noise).square().mean()

        data = torch.ones(8, 4, dtype=torch.float64)
        window = next(faccel.windows(loader_of(ctx, data, 2), ctx, size=4))
        return faccel.forward_backward(denoise, wrapped, window, scaler, ctx)[0].abs().max().item()

    assert max(simulate(step, 2, mesh="pp=2")) < 1e-12


def test_a_frozen_stage_and_a_stage_with_only_a_tied_copy():
    def step(ctx, freeze, split):
        net = model()
        net.embed.requires_grad_(not freeze)
        plan = faccel.Plan(pipeline=faccel.parallel.PipelineConfig(chain=CHAIN, split=split))
        wrapped, scaler = faccel.wrap(net, ctx, plan=plan), faccel.init_scaler(ctx)
        opt = faccel.wrap_optimizer(torch.optim.SGD(wrapped.parameters(), lr=0.1), wrapped, ctx)
        window = next(faccel.windows(loader_of(ctx, tokens(8), 2), ctx, size=4))
        _, scaler = faccel.forward_backward(loss_fn, wrapped, window, scaler, ctx)
        info, _ = faccel.optimizer_step(opt, scaler, ctx, clip_norm=1.0)
        return info.grad_norm.item()

    for freeze, split in ((False, "head"), (True, "blocks.0")):
        (one,) = simulate(step, 1, freeze, split)
        assert all(
            abs(norm - one) < 1e-10 for norm in simulate(step, 2, freeze, split, mesh="pp=2")
        )


@pytest.mark.parametrize("mesh", ["tp=2", "dp_shard=2,tp=2"])
def test_tied_weights_stay_tied_when_both_are_sharded(mesh):
    cuts = TENSOR | {"embed.token": "rowwise_embedding", "head": "colwise_gather"}
    (one,) = simulate(train, 1)
    plan = faccel.Plan(units="Block", tensor=cuts)
    for got in simulate(lambda ctx: train(ctx, plan), faccel.MeshSpec.of(mesh).size, mesh=mesh):
        assert max(differences(got, one).values()) < 1e-10
        assert "head.weight" not in got.params
    plan = faccel.Plan(tensor={"head": "colwise_gather"})
    with pytest.raises(ModelError, match="sharded in two ways"):
        simulate(lambda ctx: faccel.wrap(model(), ctx, plan=plan), 2, mesh="tp=2")


@pytest.mark.parametrize("how", ["optimizer", "model", "module"])
def test_gradients_without_sync_are_cleared(how):
    def step(ctx):
        torch.manual_seed(0)
        wrapped = faccel.wrap(nn.Sequential(nn.Linear(4, 4), nn.Tanh()).double(), ctx)
        opt = faccel.wrap_optimizer(torch.optim.SGD(wrapped.parameters(), lr=0.1), wrapped, ctx)
        x = torch.ones(2, 4, dtype=torch.float64)
        with faccel.grad_sync(wrapped, on=False):
            scaler = faccel.scaled_backward(
                F.softplus(wrapped(x)).sum(), faccel.init_scaler(ctx), ctx
            )
        {"optimizer": opt, "model": wrapped, "module": faccel.unwrap(wrapped)}[how].zero_grad()
        faccel.scaled_backward(wrapped(2 * x).sum(), scaler, ctx)
        return grads_of(wrapped)

    (one,) = simulate(step, 1)
    for mesh in ("dp_shard=2", "dp_replicate=2"):
        for grads in simulate(step, 2, mesh=mesh):
            assert all((grads[name] - grad).abs().max() < 1e-12 for name, grad in one.items())


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.relu, self.b = nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)

    def forward(self, x):
        return self.b(self.relu(self.a(x)))


def test_a_chain_without_some_module_is_an_error():
    def propose(ctx):
        return faccel.parallel.plan_for(Pair(), ctx).pipeline.chain

    assert simulate(propose, 2, mesh="pp=2")[0] == ("a", "relu", "b")
    plan = faccel.Plan(pipeline=faccel.parallel.PipelineConfig(chain=("a", "b")))
    with pytest.raises(ModelError, match="`relu`"):
        simulate(lambda ctx: faccel.wrap(Pair(), ctx, plan=plan), 2, mesh="pp=2")


def test_batch_norm_in_training_mode_and_scalar_parameters_are_errors():
    class AnyBatchNorm(nn.modules.batchnorm._BatchNorm):
        def _check_input_dim(self, input):
            pass

    class Normed(nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.a, self.norm, self.b = nn.Linear(4, 4), norm(4), nn.Linear(4, 4)

    plan = faccel.Plan(
        pipeline=faccel.parallel.PipelineConfig(chain=("a", "norm", "b"), split="norm")
    )

    def infer(ctx, norm):
        with torch.no_grad():
            faccel.wrap(Normed(norm), ctx, plan=plan)(torch.ones(4, 4))

    for norm in (nn.BatchNorm1d, AnyBatchNorm):
        with pytest.raises(ModelError, match="batch norm"):
            simulate(lambda ctx, norm=norm: infer(ctx, norm), 2, mesh="pp=2")

    def scalar(ctx):
        net = nn.Linear(2, 2)
        net.scale = nn.Parameter(torch.ones(()))
        faccel.wrap(net, ctx)

    with pytest.raises(ModelError, match="`scale`"):
        simulate(scalar, 2, mesh="dp_shard=2")


def test_the_first_stage_of_a_tied_parameter_names_it_on_any_rank():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))
            self.c.weight = self.b.weight

    # Stage 1 (`b`) is on rank 1, stage 2 (`c`) on rank 0.
    pipeline = faccel.parallel.PipelineConfig(
        chain=("a", "b", "c", "d"),
        split=("b", "c", "d"),
        schedule="interleaved",
        stages_per_rank=2,
    )

    def names(ctx):
        wrapped = faccel.wrap(Tied(), ctx, plan=faccel.Plan(pipeline=pipeline))
        return list(wrapped.parallelism.tied_copies(wrapped.engine).values())

    assert simulate(names, 2, mesh="pp=2") == (["b.weight"], [])


@pytest.mark.parametrize("owner", ["model", "optimizer"])
def test_zero_grad_between_two_backwards_of_one_grad_sync_drops_the_gradients(owner):
    def step(ctx):
        torch.manual_seed(0)
        wrapped = faccel.wrap(nn.Linear(4, 4), ctx)
        opt = faccel.wrap_optimizer(torch.optim.SGD(wrapped.parameters()), wrapped, ctx)
        with faccel.grad_sync(wrapped, on=False):
            wrapped(torch.ones(2, 4)).sum().backward()
            (wrapped if owner == "model" else opt).zero_grad()
            wrapped(torch.ones(2, 4)).sum().backward()
        with faccel.grad_sync(wrapped, on=True):
            wrapped(torch.ones(2, 4)).sum().backward()
        return full(wrapped.weight.grad)

    for grad in simulate(step, 2, mesh="dp_shard=2"):
        assert torch.equal(grad, torch.full((4, 4), 4.0))
