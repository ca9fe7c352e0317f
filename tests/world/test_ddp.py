"""The options of DDP and the compression of its gradients: simulated, and over gloo."""

import gc

import pytest
import torch
from torch import nn

import faccel
from faccel.errors import ConfigError, ModelError
from faccel.testing import assert_replicated, fake_context, simulate
from tests.ranks import run_ranks


class Branches(nn.Module):
    """A model of which one branch may be left out."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.second = nn.Linear(16, 16)
        self.norm = nn.BatchNorm1d(16)

    def forward(self, x, both):
        return self.norm(self.first(x) + (self.second(x) if both else 0))


def run(ctx, options, both=True):
    ddp = faccel.parallel.DdpConfig(**options)
    out = train(ctx, ddp, both)
    assert_replicated(out, ctx)
    return out


def train(ctx, ddp, both=True, num_updates=3):
    torch.manual_seed(0)
    model = faccel.wrap(Branches().double(), ctx, plan=faccel.Plan(ddp=ddp))
    model.norm.eval()  # its statistics are of this rank's rows alone
    opt = faccel.wrap_optimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, ctx)
    scaler = faccel.init_scaler(ctx)
    rows = torch.randn(
        num_updates, 8, 16, generator=faccel.random.generator(1), dtype=torch.float64
    )
    for update in rows:
        x = update.chunk(ctx.data_world_size)[ctx.data_rank]
        scaler = faccel.scaled_backward(model(x, both).square().mean(), scaler, ctx)
        _, scaler = faccel.optimizer_step(opt, scaler, ctx)
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def distance(a, b):
    return max((a[name] - b[name]).abs().max().item() for name in a)


EXACT = [
    {"find_unused_parameters": True},
    {"static_graph": True},
    {"forward_sync_buffers": False},
    {"bucket_cap_mb": 0.001},
    {"gradient_as_bucket_view": False},
]


@pytest.mark.parametrize("options", EXACT, ids=lambda o: next(iter(o)))
def test_every_option_trains_as_one_process_does(options):
    expected = run(fake_context(0, 1), options)
    for got in simulate(run, 2, options):
        assert distance(got, expected) < 1e-14


@pytest.mark.parametrize(
    "options", [{"find_unused_parameters": True}, {"static_graph": True}], ids=str
)
def test_unused_parameters_are_left_as_they_are(options):
    expected = run(fake_context(0, 1), {}, both=False)
    for got in simulate(run, 2, options, False):
        assert distance(got, expected) < 1e-14


@pytest.mark.parametrize(
    "options", [{"static_graph": True}, {"find_unused_parameters": True}], ids=str
)
def test_windows_accumulate_under_every_option(options):
    def fn(ctx):
        model = faccel.wrap(
            nn.Linear(2, 1, bias=False),
            ctx,
            plan=faccel.Plan(ddp=faccel.parallel.DdpConfig(**options)),
        )
        rows, grads = torch.arange(16.0).view(8, 2), []
        for window in rows.view(2, 2, 2, 2)[:, :, :, :]:  # windows of two micro-batches of two rows
            for i, micro in enumerate(window):
                with faccel.grad_sync(model, on=i == 1):
                    local_rows = micro.chunk(ctx.data_world_size)[ctx.data_rank]
                    faccel.scaled_backward(
                        model(local_rows).mean(), faccel.init_scaler(ctx), ctx, scale=0.5
                    )
            grads.append(model.weight.grad.clone())
            model.zero_grad()
        return grads

    expected = fn(fake_context(0, 1))
    for got in simulate(fn, 2):
        assert all(torch.allclose(a, b) for a, b in zip(got, expected, strict=True))


def test_ranks_that_build_different_models_are_an_error_on_each():
    def fn(ctx):
        with pytest.raises(ModelError, match="rank 0: model"):
            faccel.wrap(nn.Linear(2, 1 + ctx.rank), ctx)

    simulate(fn, 2)


def test_unused_parameters_without_the_option_are_an_error_that_shows_it():
    with pytest.raises(ModelError, match="find_unused_parameters=True"):
        simulate(run, 2, {}, False)


def test_ranks_may_use_different_branches():
    def fn(ctx):
        model = faccel.wrap(
            Branches(),
            ctx,
            plan=faccel.Plan(ddp=faccel.parallel.DdpConfig(find_unused_parameters=True)),
        )
        model.norm.eval()
        faccel.scaled_backward(
            model(torch.ones(2, 16), ctx.rank == 0).sum(), faccel.init_scaler(ctx), ctx
        )
        return model.second.bias.grad.clone()

    a, b = simulate(fn, 2)
    assert torch.equal(a, b)
    assert torch.allclose(a, torch.ones(16), rtol=1e-4)  # 2 rows, averaged over the ranks


def test_bucket_cap_mb_limits_the_size_of_buckets():
    def reductions(options):
        trace = simulate(run, 2, options).trace
        return sum(e.op == "all_reduce" and e.rank == 0 for e in trace)

    assert reductions({"bucket_cap_mb": 0.001}) > reductions({})


def statistics(ctx, sync):
    model = faccel.wrap(
        nn.BatchNorm1d(1),
        ctx,
        plan=faccel.Plan(ddp=faccel.parallel.DdpConfig(forward_sync_buffers=sync)),
    )
    before = model.running_mean.clone()
    for _ in range(2):
        model(torch.full((4, 1), float(ctx.rank)) + torch.arange(4.0)[:, None])
    local_mean = model.running_mean.clone()
    model.eval()
    return before.item(), local_mean.item(), model.running_mean.item()


def test_without_forward_sync_buffers_differ_between_ranks_until_evaluation():
    a, b = simulate(statistics, 2, False)
    assert a[0] == b[0]
    assert a[1] != b[1]
    assert a[2] == b[2] == a[1]


def compressed(ctx, hook, num_updates=4):
    powersgd = faccel.parallel.PowerSgdConfig(rank=2, start_step=2)
    return train(
        ctx,
        faccel.parallel.DdpConfig(comm_hook=hook, powersgd=powersgd, bucket_cap_mb=1),
        num_updates=num_updates,
    )


@pytest.mark.parametrize(
    ("hook", "atol"), [("fp16", 1e-4), ("bf16", 1e-3), ("powersgd", 0.1), ("fp16_powersgd", 0.1)]
)
def test_compressed_gradients_are_close_and_the_same_on_every_rank(hook, atol):
    exact = compressed(fake_context(0, 1), None)
    first, second = simulate(compressed, 2, hook)
    assert distance(first, second) == 0
    assert 0 < distance(first, exact) < atol


def test_compression_sends_fewer_bytes():
    def sent(hook):
        return sum(
            e.num_bytes for e in simulate(compressed, 2, hook, 8).trace if e.op == "all_reduce"
        )

    plain = sent(None)
    assert sent("fp16") < 0.3 * plain  # a quarter: the model is in double precision
    assert sent("bf16") < 0.3 * plain
    assert sent("powersgd") < 0.7 * plain
    assert sent("bf16_powersgd") < sent("powersgd")


@pytest.mark.parametrize("hook", ["fp16", "bf16", "powersgd"])
def test_hooks_do_over_gloo_what_they_do_in_a_simulation(hook):
    real, simulated = run_ranks(compressed, 2, hook)[0], simulate(compressed, 2, hook)[0]
    assert distance(real, simulated) < 1e-12


def test_a_plan_is_checked():
    for make in (
        lambda: faccel.parallel.DdpConfig(comm_hook="fp8"),
        lambda: faccel.parallel.DdpConfig(bucket_cap_mb=0),
        lambda: faccel.parallel.PowerSgdConfig(rank=-1),
        lambda: faccel.parallel.PowerSgdConfig(start_step=1),
        lambda: faccel.parallel.DdpConfig(static_graph="yes"),
        lambda: faccel.Plan(ddp={"static_graph": True}),
    ):
        with pytest.raises(ConfigError):
            make()


@pytest.mark.parametrize("reduced", [True, False])
def test_a_model_that_only_one_rank_still_has_changes_no_collective(reduced):
    def fn(ctx):
        models = []
        for _ in range(2):
            models.append(faccel.wrap(nn.Linear(2, 1), ctx))
            scaler = faccel.init_scaler(ctx)
            with faccel.grad_sync(models[-1], on=reduced):
                loss = models[-1](torch.ones(1, 2)).sum() * (ctx.rank + 1)
                faccel.scaled_backward(loss, scaler, ctx)
            if ctx.rank == 1:
                # an engine is in a cycle: without a collection the rank may have it for long
                del models[:-1], loss
                gc.collect()
        return [grad.item() for grad in models[-1].weight.grad[0]]

    first, second = simulate(fn, 2)
    assert (first, second) == (([1.5] * 2,) * 2 if reduced else ([1.0] * 2, [2.0] * 2))


def test_backwards_without_a_forward_between_them_reduce():
    def fn(ctx):
        torch.manual_seed(0)
        model = faccel.wrap(nn.Linear(2, 1, bias=False), ctx)
        scaler = faccel.init_scaler(ctx)
        outputs = [model(torch.ones(1, 2)).sum() for _ in range(2)]
        # two forwards, their backwards, and a penalty without a forward
        for loss in (*outputs, model.weight.sum()):
            scaler = faccel.scaled_backward(loss * (ctx.rank + 1), scaler, ctx)
        scaler = faccel.scaled_backward(model(torch.ones(1, 2)).sum(), scaler, ctx)
        return model.weight.grad.tolist()

    assert simulate(fn, 2) == ([[3 * 1.5 + 1] * 2],) * 2
