"""Moving averages on every mesh equal those of `torch.optim.swa_utils` on one process."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

import faccel
from faccel.errors import CheckpointError, ConfigError, DonatedError, ModelError
from faccel.parallel import ema_weights, init_ema, update_ema
from faccel.testing import fake_context, simulate
from tests.laws.test_backends import PLAN, Net
from tests.models import loss_of, model, tokens
from tests.training import TIED, full, plan_of

CTX = fake_context(0, 1)
DECAY, ROWS, STEPS, ACCUM = 0.9, 24, 3, 2
EVALUATION = tokens(6, seed=100)[:, :-1]
ZERO_1 = "zero1"
MESHES = (
    "dp_replicate=1", "dp_replicate=2", ZERO_1, "dp_shard=2", "dp_shard=3",
    "dp_replicate=2,dp_shard=2", "tp=2", "dp_shard=2,tp=2", "pp=2", "pp=2,dp_shard=2",
)  # fmt: skip


def batch_of(step):
    return tokens(ROWS, seed=step)


def reference(steps=STEPS):
    """Return the averages, the model and the logits of both, of plain PyTorch on one process."""
    net = model(depth=1)
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    average.update_parameters(net)  # the first call copies: averages begin with the parameters
    opt = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for step in range(steps):
        batch = batch_of(step)
        loss_of(net(batch[:, :-1]), batch[:, 1:]).backward()
        opt.step()
        opt.zero_grad()
        average.update_parameters(net)
    return average.module, net


def world_size_of(mesh):
    return 2 if mesh == ZERO_1 else faccel.MeshSpec.of(mesh).size


def simulated(fn, mesh, *args):
    on_mesh = "dp_replicate=2" if mesh == ZERO_1 else mesh
    return simulate(fn, world_size_of(mesh), mesh, *args, mesh=on_mesh)


def prepared(ctx, mesh, **options):
    ddp = faccel.parallel.DdpConfig(shard_optimizer=mesh == ZERO_1)
    wrapped = faccel.wrap(model(depth=1), ctx, plan=plan_of(mesh, ddp=ddp))
    opt = torch.optim.SGD(wrapped.parameters(), lr=0.1, momentum=0.9)
    opt = faccel.wrap_optimizer(opt, wrapped, ctx)
    return wrapped, opt, init_ema(wrapped, ctx, decay=DECAY, **options)


def loss_fn(net, batch):
    return loss_of(net(batch.data[:, :-1]), batch.data[:, 1:])


def train(ctx, wrapped, opt, ema, start, stop):
    scaler = faccel.init_scaler(ctx)
    data = torch.cat([batch_of(step) for step in range(start, stop)])
    loader = faccel.shard(DataLoader(data, ROWS // ACCUM // ctx.data_world_size), ctx)
    for window in faccel.windows(loader, ctx, size=ACCUM):
        _, scaler = faccel.forward_backward(loss_fn, wrapped, window, scaler, ctx)
        _, scaler = faccel.optimizer_step(opt, scaler, ctx)
        ema = update_ema(ema, wrapped, ctx)
    return ema


def tensors_of(values):
    return {name: full(value) for name, value in values.items()}


def assert_close(got, expected, atol=1e-9):
    expected = dict(expected)
    for name, value in got.items():
        want = expected[name] if name in expected else expected[TIED[name]]
        assert torch.allclose(value, want, rtol=0, atol=atol), name


def logits_of(wrapped):
    with torch.no_grad():
        return full(wrapped(EVALUATION))


def trains_and_evaluates(ctx, mesh):
    wrapped, opt, ema = prepared(ctx, mesh)
    ema = train(ctx, wrapped, opt, ema, 0, 2)
    # In the middle, so that an evaluation must not change the rest of the training.
    with ema_weights(wrapped, ema, ctx):
        wrapped.eval()
        logits_of(wrapped)
    wrapped.train()
    ema = train(ctx, wrapped, opt, ema, 2, STEPS)
    before = tensors_of(dict(wrapped.named_parameters()))
    with ema_weights(wrapped, ema, ctx):
        applied = tensors_of(dict(wrapped.named_parameters()))
        average_logits = logits_of(wrapped)
    after = tensors_of(dict(wrapped.named_parameters()))
    return {
        "averages": tensors_of(ema.averages),
        "applied": applied,
        "before": before,
        "after": after,
        "average_logits": average_logits,
        "logits": logits_of(wrapped),
    }


@pytest.mark.parametrize("mesh", MESHES)
def test_averages_equal_those_of_torch_on_one_process(mesh):
    average, net = reference()
    for got in simulated(trains_and_evaluates, mesh):
        assert got["averages"].keys() >= got["applied"].keys() - TIED.keys()
        assert_close(got["averages"], average.named_parameters())
        assert_close(got["applied"], average.named_parameters())
        assert_close(got["after"], net.named_parameters())
        assert all(torch.equal(value, got["after"][name]) for name, value in got["before"].items())
        assert torch.allclose(got["average_logits"], average(EVALUATION), atol=1e-8)
        assert torch.allclose(got["logits"], net(EVALUATION), atol=1e-8)


def saves(ctx, mesh, folder):
    wrapped, opt, ema = prepared(ctx, mesh)
    ema = train(ctx, wrapped, opt, ema, 0, 2)
    faccel.save({"model": wrapped, "opt": opt, "ema": ema}, f"{folder}/run", ctx, step=2)
    with ema_weights(wrapped, ema, ctx):
        faccel.checkpoint.export_model(wrapped, f"{folder}/export", ctx)


def resumes(ctx, mesh, folder):
    wrapped, opt, ema = prepared(ctx, mesh)
    state = faccel.load({"model": wrapped, "opt": opt, "ema": ema}, f"{folder}/run", ctx)
    assert state["ema"].num_updates == 2 and state["ema"].decay == DECAY
    ema = train(ctx, wrapped, opt, state["ema"], 2, STEPS)
    return tensors_of(ema.averages)


@pytest.mark.parametrize(
    ("saved", "loaded"),
    list(zip(MESHES, (*MESHES[4:], *MESHES[:4]), strict=True)),
)
def test_averages_are_saved_loaded_and_exported_in_every_layout(saved, loaded, tmp_path):
    simulated(saves, saved, str(tmp_path))
    halfway, _ = reference(steps=2)
    assert_close(load_file(tmp_path / "export" / "model.safetensors"), halfway.named_parameters())
    average, _ = reference()
    for averages in simulated(resumes, loaded, str(tmp_path)):
        assert_close(averages, average.named_parameters())


@pytest.mark.parametrize("warmup", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_update_is_its_formula_also_with_warmup_and_in_low_precision(warmup, dtype):
    wrapped = faccel.wrap(nn.Linear(3, 2, dtype=dtype), CTX)
    ema = init_ema(wrapped, CTX, decay=0.99, warmup=warmup)
    expected = wrapped.module.weight.detach().double()
    for step in range(20):
        with torch.no_grad():
            wrapped.module.weight.add_(0.01)
        ema = update_ema(ema, wrapped, CTX)
        decay = min(0.99, (1 + step) / (10 + step)) if warmup else 0.99
        expected = decay * expected + (1 - decay) * wrapped.module.weight.detach().double()
    assert ema.averages["weight"].dtype == torch.float32
    assert torch.allclose(ema.averages["weight"].double(), expected, rtol=1e-5)
    weight = wrapped.module.weight.detach().clone()
    with ema_weights(wrapped, ema, CTX):
        assert torch.equal(wrapped.module.weight, ema.averages["weight"].to(dtype))
    assert torch.equal(wrapped.module.weight, weight)


def test_an_update_allocates_no_tensors():
    wrapped = faccel.wrap(nn.Linear(3, 2), CTX)
    ema = init_ema(wrapped, CTX)
    pointers = {name: value.data_ptr() for name, value in ema.averages.items()}
    with torch.profiler.profile(profile_memory=True) as profile:
        ema = update_ema(ema, wrapped, CTX)
    assert {name: value.data_ptr() for name, value in ema.averages.items()} == pointers
    assert sum(max(event.self_cpu_memory_usage, 0) for event in profile.key_averages()) == 0


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)

    def forward(self, x):
        return self.norm(self.linear(x))


@pytest.mark.parametrize("buffers", ["copy", "average"])
@pytest.mark.parametrize("mesh", ["dp_replicate=1", "dp_replicate=2", "dp_shard=2"])
def test_buffers_are_the_models_or_averaged(mesh, buffers):
    def fn(ctx, mesh):
        wrapped = faccel.wrap(Normed(), ctx)
        ema = init_ema(wrapped, ctx, decay=DECAY, buffers=buffers)
        for step in range(3):
            # Equal batches on all ranks, so that one process computes the same statistics.
            wrapped(torch.randn(8, 3, generator=faccel.random.generator(step)) + step)
            ema = update_ema(ema, wrapped, ctx)
        before = tensors_of(dict(wrapped.module.named_buffers()))
        with ema_weights(wrapped, ema, ctx):
            inside = tensors_of(dict(wrapped.module.named_buffers()))
        after = tensors_of(dict(wrapped.module.named_buffers()))
        return before, inside, after

    net = Normed()
    average = AveragedModel(
        net, multi_avg_fn=get_ema_multi_avg_fn(DECAY), use_buffers=buffers == "average"
    )
    average.update_parameters(net)
    for step in range(3):
        net(torch.randn(8, 3, generator=faccel.random.generator(step)) + step)
        average.update_parameters(net)
    for before, inside, after in simulated(fn, mesh):
        for name in ("norm.running_mean", "norm.running_var"):
            assert torch.allclose(inside[name], dict(average.module.named_buffers())[name])
        assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_batch_statistics_that_differ_between_ranks_are_rank_0s():
    def fn(ctx, mesh):
        wrapped = faccel.wrap(Normed(), ctx)
        ema = init_ema(wrapped, ctx, decay=DECAY, buffers="average")
        wrapped(torch.randn(8, 3, generator=faccel.random.generator(ctx.rank)) + ctx.rank)
        ema = update_ema(ema, wrapped, ctx)
        with ema_weights(wrapped, ema, ctx):
            return wrapped.module.norm.running_mean.clone(), ema.averages["norm.running_mean"]

    (first, average), (second, _) = simulated(fn, "dp_shard=2")
    assert torch.equal(first, second) and torch.equal(first, average)


def test_frozen_parameters_have_no_average():
    wrapped = faccel.wrap(Normed(), CTX)
    wrapped.module.linear.requires_grad_(False)
    ema = init_ema(wrapped, CTX)
    assert sorted(ema.averages) == ["norm.bias", "norm.weight"]
    wrapped.module.norm.bias.requires_grad_(False)  # it keeps its average
    ema = update_ema(ema, wrapped, CTX)
    wrapped.module.linear.bias.requires_grad_(True)
    with pytest.raises(ModelError, match=r"`linear\.bias` in the model, without an average"):
        update_ema(ema, wrapped, CTX)


@pytest.mark.parametrize("frozen", ["first", "last"])
def test_a_stage_of_a_pipeline_may_have_no_average(frozen, tmp_path):
    def fn(ctx):
        net = Net()
        getattr(net, frozen).requires_grad_(False)
        net.layers.requires_grad_(False)
        wrapped = faccel.wrap(net, ctx, plan=PLAN)
        ema = update_ema(init_ema(wrapped, ctx), wrapped, ctx)
        faccel.save({"model": wrapped, "ema": ema}, str(tmp_path), ctx, step=1)
        ema = faccel.load({"model": wrapped, "ema": ema}, str(tmp_path), ctx)["ema"]
        with ema_weights(wrapped, ema, ctx), torch.no_grad():
            wrapped(torch.ones(4, 4))
        return sorted(ema.averages)

    trained = "last" if frozen == "first" else "first"
    names = [f"{trained}.bias", f"{trained}.weight"]
    by_rank = simulate(fn, 2, mesh="pp=2")
    assert sorted(by_rank, key=len) == [[], names]


@pytest.mark.parametrize("mesh", ["dp_replicate=1", "dp_shard=2", "pp=2"])
def test_the_parameters_are_restored_after_an_exception(mesh):
    def fn(ctx, mesh):
        wrapped, opt, ema = prepared(ctx, mesh)
        ema = train(ctx, wrapped, opt, ema, 0, 1)
        before = tensors_of(dict(wrapped.named_parameters()))
        with pytest.raises(ZeroDivisionError), ema_weights(wrapped, ema, ctx):
            1 / 0  # noqa: B018
        after = tensors_of(dict(wrapped.named_parameters()))
        assert all(torch.equal(value, after[name]) for name, value in before.items())
        update_ema(ema, wrapped, ctx)

    simulated(fn, mesh)


def test_a_consumed_or_applied_record_raises(tmp_path):
    wrapped = faccel.wrap(nn.Linear(3, 2), CTX)
    first = init_ema(wrapped, CTX)
    duplicate = copy.deepcopy(first)
    ema = update_ema(first, wrapped, CTX)
    uses = (
        lambda ema: update_ema(ema, wrapped, CTX),
        lambda ema: ema_weights(wrapped, ema, CTX),
        lambda ema: faccel.save({"ema": ema}, tmp_path, CTX, step=1),
    )
    for use in uses:
        with pytest.raises((DonatedError, CheckpointError), match="was consumed by `update_ema`"):
            use(first)
        with (
            ema_weights(wrapped, ema, CTX),
            pytest.raises((DonatedError, CheckpointError), match="`ema` is applied"),
        ):
            use(ema)
    for use in uses[:2]:  # another average of the same model
        with (
            ema_weights(wrapped, ema, CTX),
            pytest.raises(DonatedError, match="another average is applied"),
        ):
            use(duplicate)
    update_ema(ema, wrapped, CTX)
    update_ema(duplicate, wrapped, CTX)  # a deep copy lives on


def test_a_checkpoint_of_other_parameters_does_not_load(tmp_path):
    wrapped = faccel.wrap(nn.Linear(3, 2), CTX)
    ema = init_ema(wrapped, CTX)
    faccel.save({"ema": ema}, tmp_path, CTX, step=1)
    wider = init_ema(faccel.wrap(nn.Linear(4, 2), CTX), CTX)
    other = init_ema(faccel.wrap(Normed(), CTX), CTX)
    for state, message in (
        ({"ema": wider}, r"\[2, 3\] in the checkpoint, \[2, 4\] in the state"),
        ({"ema": other}, "only in the checkpoint"),
        ({"ema": None}, "averages in the checkpoint"),
        ({"ema": wrapped}, "no module in the checkpoint"),
    ):
        with pytest.raises(CheckpointError, match=message):
            faccel.load(state, tmp_path, CTX)


def test_mistakes_raise():
    wrapped = faccel.wrap(nn.Linear(3, 2), CTX)
    ema = init_ema(wrapped, CTX)
    for options in ({"decay": 1.5}, {"decay": float("nan")}, {"buffers": "mean"}, {"warmup": 10}):
        with pytest.raises(ConfigError, match=f"`{next(iter(options))}`"):
            init_ema(wrapped, CTX, **options)
    with pytest.raises(ConfigError, match="`ema` must be an EmaState"):
        update_ema(wrapped, ema, CTX)
    with pytest.raises(ModelError, match="another layout"):
        update_ema(ema, faccel.wrap(nn.Linear(1, 2), CTX), CTX)
    frozen = faccel.wrap(nn.Linear(3, 2).requires_grad_(False), CTX)
    with pytest.raises(ModelError, match="frozen"):
        init_ema(frozen, CTX)
