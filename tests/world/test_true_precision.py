"""bf16-true and fp16-true: parameters, gradients and optimizer states in 16 bits, on every mesh."""

import pytest
import torch
from torch import nn

import faccel
from faccel.errors import CheckpointError, ConfigError, ModelError
from faccel.parallel import FsdpConfig, PipelineConfig
from faccel.testing import fake_context, simulate
from faccel.tree import full_tensor

pytestmark = pytest.mark.filterwarnings("ignore")

DTYPES = {"bf16-true": torch.bfloat16, "fp16-true": torch.float16}
MESHES = {
    "dp_replicate=2": 2,
    "dp_shard=2": 2,
    "dp_replicate=2,dp_shard=2": 4,
    "tp=2": 2,
    "pp=2": 2,
}
PLAN = faccel.Plan(
    tensor={"0": "colwise", "2": "rowwise"},
    pipeline=PipelineConfig(chain=("0", "1", "2", "3"), split=("2",)),
)
ROWS = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))


def make_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8), nn.LayerNorm(8))


def loss_fn(model, batch):
    out = model(batch.data)
    assert out.dtype == torch.float32
    return (out - batch.data).square().mean()


def train(ctx):
    """Return the losses, the parameters, and all dtypes of parameters, gradients and states."""
    model = faccel.wrap(make_net(), ctx, plan=PLAN)
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    opt = faccel.wrap_optimizer(opt, model, ctx)
    scaler = faccel.init_scaler(ctx)
    loader = faccel.shard(torch.utils.data.DataLoader(ROWS, 4), ctx, split_batches=True)
    losses, dtypes = [], set()
    for window in faccel.windows(loader, ctx, size=2):
        loss, scaler = faccel.forward_backward(loss_fn, model, window, scaler, ctx)
        dtypes |= {param.grad.dtype for param in model.parameters()}
        _, scaler = faccel.optimizer_step(opt, scaler, ctx)
        losses.append(faccel.reduce(loss.mean(), ctx, op="mean").item())
    for state in opt.state.values():
        dtypes |= {value.dtype for value in state.values() if value is not None}
    state = faccel.parallel.full_state_dict(model, ctx, rank=None)
    return losses, state, dtypes | {value.dtype for value in state.values()}


def by_hand(dtype):
    net = make_net().to(dtype)
    opt = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for rows in ROWS.split(8):
        loss = 0
        for part in rows.split(4):
            out = net(part.to(dtype)).float()
            part_loss = (out - part).square().mean()
            (part_loss / 2).backward()
            loss += part_loss.item() / 2
        opt.step()
        opt.zero_grad()
        losses.append(loss)
    return losses, {name: value.detach() for name, value in net.state_dict().items()}


@pytest.mark.parametrize("precision", DTYPES)
def test_one_process_computes_what_a_cast_module_computes(precision):
    ((losses, state, dtypes),) = simulate(train, 1, config={"mixed_precision": precision})
    expected, expected_state = by_hand(DTYPES[precision])
    assert losses == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(state, expected_state, rtol=0, atol=0)
    assert dtypes == {DTYPES[precision]}


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("precision", DTYPES)
def test_every_mesh_trains_parameters_of_16_bits(precision, mesh):
    config = {"mixed_precision": precision}
    expected, expected_state = by_hand(DTYPES[precision])
    for losses, state, dtypes in simulate(train, MESHES[mesh], config=config, mesh=mesh):
        assert losses == pytest.approx(expected, rel=0.01)
        torch.testing.assert_close(state, expected_state, rtol=0.02, atol=0.01)
        assert dtypes == {DTYPES[precision]}


def test_buffers_and_inputs_are_cast_and_integers_are_not():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(8, 4)
            self.register_buffer("table", torch.ones(4))
            self.register_buffer("count", torch.ones(4, dtype=torch.int64))

        def forward(self, tokens, *, scale):
            assert (tokens.dtype, scale["x"].dtype) == (torch.int64, torch.bfloat16)
            assert (self.table.dtype, self.count.dtype) == (torch.bfloat16, torch.int64)
            return self.embed(tokens) * self.table * scale["x"]

    net = Net()
    before = list(net.parameters())
    model = faccel.wrap(net, fake_context(0, 1, config={"mixed_precision": "bf16-true"}))
    out = model(torch.arange(3), scale={"x": torch.ones(4)})
    assert out.dtype == torch.float32
    assert [id(param) for param in net.parameters()] == [id(param) for param in before]


def test_the_loss_of_fp16_true_is_not_scaled():
    # Gradients of 16 bits would lose by the division what the scale gains.
    assert not faccel.init_scaler(
        fake_context(0, 1, config={"mixed_precision": "fp16-true"})
    ).enabled


@pytest.mark.parametrize(("saved", "loaded"), [("no", "bf16-true"), ("bf16-true", "no")])
def test_a_checkpoint_of_another_dtype_is_an_error_and_an_export_loads(saved, loaded, tmp_path):
    ctx = fake_context(0, 1, config={"mixed_precision": saved})
    model = faccel.wrap(make_net(), ctx)
    faccel.save({"model": model}, tmp_path / "run", ctx, step=1)
    faccel.checkpoint.export_model(model, tmp_path / "export", ctx)
    other = fake_context(0, 1, config={"mixed_precision": loaded})
    into = faccel.wrap(make_net(), other)
    with pytest.raises(CheckpointError, match="bfloat16"):
        faccel.load({"model": into}, tmp_path / "run", other)
    faccel.checkpoint.load_model(into, tmp_path / "export", other)


# Small updates.


def test_an_optimizer_that_loses_small_updates_is_reported(caplog, log_records):
    def connect(ctx):
        model = faccel.wrap(make_net(), ctx)
        faccel.wrap_optimizer(torch.optim.AdamW(model.parameters()), model, ctx)

    simulate(connect, 2, config={"mixed_precision": "bf16-true"})
    (text,) = [record.getMessage() for record in log_records()]
    assert "AdamW rounds its updates to torch.bfloat16: those below about 1/256" in text
    assert "bf16_stochastic_round=True" in text
    caplog.clear()
    simulate(connect, 2, config={"mixed_precision": "bf16"})
    assert not log_records()


ZERO_1 = faccel.Plan(ddp=faccel.parallel.DdpConfig(shard_optimizer=True))


def updated(ctx, is_stochastic, num_steps, seed, folder=None, plan=None):
    """Return the weights after steps of a ten-thousandth, beginning with 1."""
    torch.manual_seed(seed + ctx.rank)  # as `seed_everything(per_data_rank=True)`
    model = faccel.wrap(nn.Linear(64, 64, bias=False), ctx, plan=plan)
    with torch.no_grad():
        model.module.weight.fill_(1.0)
    cls = torch.optim.AdamW
    options = {}
    if is_stochastic:
        from torchao.optim import _AdamW as cls

        options = {"bf16_stochastic_round": True}
    opt = cls(model.parameters(), lr=1e-4, weight_decay=0.0, **options)
    opt = faccel.wrap_optimizer(opt, model, ctx)
    if folder is not None and folder.exists():
        faccel.load({"model": model, "opt": opt}, folder, ctx)
    for _ in range(num_steps):
        model(torch.ones(2, 64)).sum().backward()
        opt.step()
        opt.zero_grad()
    if folder is not None:
        faccel.save({"model": model, "opt": opt}, folder, ctx, step=num_steps, overwrite=True)
    drawn = torch.rand(())  # the step leaves the random numbers of the user alone
    return full_tensor(model.module.weight.detach()).float(), drawn


CONFIG = {"mixed_precision": "bf16-true"}


def test_updates_that_bf16_cannot_represent_are_lost_without_stochastic_rounding():
    ((weights, _),) = simulate(updated, 1, False, 20, 0, config=CONFIG)
    assert weights.eq(1).all()


@pytest.fixture
def without_compiler():
    pytest.importorskip("torchao.optim", reason="torchao is not installed")
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize("mesh", ["dp_replicate=2", "dp_shard=2", "dp_replicate=2,dp_shard=2"])
def test_stochastic_rounding_keeps_the_mean_and_replicas_equal(without_compiler, mesh):
    results = simulate(updated, MESHES[mesh], True, 20, 0, config=CONFIG, mesh=mesh)
    for weights, _ in results:
        # 4096 weights, each with an error of at most 2^-8 per step
        assert weights.mean().item() == pytest.approx(1 - 20 * 1e-4, abs=4e-4)
        assert torch.equal(weights, results[0][0])
    assert len({drawn.item() for _, drawn in results}) == len(results)


def test_stochastic_rounding_under_zero_1(without_compiler, log_records):
    results = simulate(updated, 2, True, 20, 0, None, ZERO_1, config=CONFIG)
    for weights, _ in results:
        assert weights.mean().item() == pytest.approx(1 - 20 * 1e-4, abs=4e-4)
        assert torch.equal(weights, results[0][0])
    assert not log_records()


def test_a_resumed_run_rounds_as_one_that_was_not_interrupted(without_compiler, tmp_path):
    ((expected, _),) = simulate(updated, 1, True, 6, 0, config=CONFIG)
    simulate(updated, 1, True, 3, 1, tmp_path / "run", config=CONFIG)
    ((weights, _),) = simulate(updated, 1, True, 3, 2, tmp_path / "run", config=CONFIG)
    assert torch.equal(weights, expected)


# What is an error.


def test_complex_parameters_are_an_error():
    net = nn.Linear(2, 2, dtype=torch.complex64)
    with pytest.raises(ModelError, match="`weight` is complex"):
        faccel.wrap(net, fake_context(0, 1, config=CONFIG))


def test_units_in_fp32_are_an_error():
    def wrap(ctx):
        faccel.wrap(
            make_net(), ctx, plan=faccel.Plan(units=("0",), fsdp=FsdpConfig(fp32_units="0"))
        )

    with pytest.raises(ConfigError, match="`fp32_units` needs parameters in fp32"):
        simulate(wrap, 2, config=CONFIG, mesh="dp_shard=2")


@pytest.mark.parametrize("precision", DTYPES)
def test_deepspeed_and_pure_functions_refuse_it(precision):
    refuse = faccel.backends.BACKENDS["deepspeed"].refuse
    assert precision in refuse(faccel.Config(mixed_precision=precision), "cuda")
    ctx = fake_context(0, 1, config={"mixed_precision": precision})
    with pytest.raises(ConfigError, match=precision):
        faccel.func.value_and_grad(lambda params, batch, generator: 0, ctx)
