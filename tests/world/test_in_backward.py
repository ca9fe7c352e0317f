"""Steps inside of backward are the steps after it."""

import pytest
import torch

import faccel
from faccel.errors import ConfigError, OptimizerError
from faccel.testing import fake_context, simulate
from tests.models import loss_of, model, tokens
from tests.training import full, plan_of

KINDS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01),
    "foreach": lambda params: torch.optim.Adam(params, lr=0.01, foreach=True),
}


def train(ctx, kind, inside, mesh, steps=2):
    wrapped = faccel.wrap(model(), ctx, plan=plan_of(mesh))
    opt = faccel.wrap_optimizer(KINDS[kind](wrapped.parameters()), wrapped, ctx)
    schedule = torch.optim.lr_scheduler.StepLR(opt, 1, 0.5)
    scaler = faccel.init_scaler(ctx)

    def backward(seed, scaler):
        batch = tokens(8, seed=seed).chunk(ctx.data_world_size)[ctx.data_rank]
        return faccel.scaled_backward(
            loss_of(wrapped(batch[:, :-1]), batch[:, 1:]), scaler, ctx, scale=0.5
        )

    for step in range(steps):
        with faccel.grad_sync(wrapped, on=False):
            scaler = backward(2 * step, scaler)
        if inside:
            with faccel.parallel.step_in_backward(opt, wrapped, ctx):
                scaler = backward(2 * step + 1, scaler)
            assert all(p.grad is None for p in wrapped.parameters())
            schedule.step()
        else:
            scaler = backward(2 * step + 1, scaler)
            _, scaler = faccel.optimizer_step(opt, scaler, ctx, scheduler=schedule)
    assert len(opt.state) == len(list(wrapped.parameters()))
    return {name: full(p) for name, p in wrapped.named_parameters()}


@pytest.mark.filterwarnings("ignore")  # advice of torch on layouts
@pytest.mark.parametrize(("mesh", "kind"), [
    *(("dp_replicate=1", kind) for kind in KINDS), ("dp_shard=2", "sgd"), ("dp_shard=2", "foreach"),
    ("dp_shard=2,tp=2", "adamw"),
    pytest.param("dp_shard=2", "adamw", marks=pytest.mark.slow),
    pytest.param("dp_shard=2,tp=2", "sgd", marks=pytest.mark.slow),
    pytest.param("dp_shard=2,tp=2", "foreach", marks=pytest.mark.slow),
])  # fmt: skip
def test_parameters_equal_those_of_the_loop_with_optimizer_step(mesh, kind):
    size = faccel.MeshSpec.of(mesh).size
    in_backward = simulate(train, size, kind, True, mesh, mesh=mesh)
    after_backward = simulate(train, size, kind, False, mesh, mesh=mesh)
    for params, expected in zip(in_backward, after_backward, strict=True):
        assert all((p - expected[name]).abs().max() < 1e-12 for name, p in params.items())


def test_fp16_replicas_and_foreign_optimizers_are_unsupported():
    net = torch.nn.Linear(1, 1)
    for options, kind in (
        ({"config": {"mixed_precision": "fp16"}}, ConfigError),
        ({}, OptimizerError),
    ):
        ctx = fake_context(0, 1, **options)
        with pytest.raises(kind) as caught:
            faccel.parallel.step_in_backward(
                torch.optim.SGD([torch.ones(1)]), faccel.wrap(net, ctx), ctx
            )
        assert caught.value.fix

    def replicas(ctx):
        wrapped = faccel.wrap(torch.nn.Linear(1, 1), ctx)
        faccel.parallel.step_in_backward(torch.optim.SGD(wrapped.parameters()), wrapped, ctx)

    with pytest.raises(ConfigError, match="dp_shard"):
        simulate(replicas, 2)
