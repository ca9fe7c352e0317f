"""DeepSpeed in real processes: every ZeRO stage computes what one process of torch does."""

import functools
import json
import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import faccel
from faccel.backends.table import BACKENDS
from faccel.errors import FaccelError
from tests.ranks import run_ranks

REASON = BACKENDS["deepspeed"].probe(os.environ)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(REASON is not None, reason=f"DeepSpeed cannot run here: {REASON}"),
]
STAGES = (1, 2, 3)


def on(world_size, fn, *args, zero=2, **options):
    return run_ranks(fn, world_size, *args, strategy="deepspeed", zero=zero, **options)


class Net(nn.Module):
    """With shapes that no number of ranks divides, a buffer, and a parameter that is frozen."""

    def __init__(self, seed=0, width=7, outputs=3):
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b, self.c = (
            nn.Linear(5, width),
            nn.Linear(width, width, bias=False),
            nn.Linear(width, outputs),
        )
        self.norm = nn.BatchNorm1d(5)
        self.norm.requires_grad_(False)

    def forward(self, x):
        return self.c(torch.tanh(self.b(torch.tanh(self.a(self.norm(x))))))


def rows(number, count=12, width=5):
    return torch.randn(count, width, generator=faccel.random.generator(1, number))


def full_state(state):
    return {
        name: faccel.tree.full_tensor(value).detach().clone().cpu() for name, value in state.items()
    }


def prepared(ctx, net=None, plan=None, lr=0.05):
    model = faccel.wrap(Net() if net is None else net, ctx, plan=plan)
    trained = [p for p in model.parameters() if p.requires_grad]
    return model, faccel.wrap_optimizer(torch.optim.AdamW(trained, lr=lr), model, ctx)


def train(ctx, model, opt, start, stop, scaler=None, **options):
    scaler = faccel.init_scaler(ctx) if scaler is None else scaler
    norms = []
    model.train()
    faccel.unwrap(model).norm.eval()
    for number in range(start, stop):
        micro_batches = rows(number).chunk(2 * ctx.data_world_size)[2 * ctx.data_rank :][:2]
        for i, x in enumerate(micro_batches):
            with faccel.grad_sync(model, on=i == 1):
                scaler = faccel.scaled_backward(model(x).square().mean(), scaler, ctx, scale=0.5)
        info, scaler = faccel.optimizer_step(opt, scaler, ctx, clip_norm=0.1, **options)
        norms.append(info.grad_norm.item())
    return norms


def plain(stop, lr=0.05):
    """Train with plain torch on the global batch."""
    net = Net()
    net.norm.eval()
    opt = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=lr)
    norms = []
    for number in range(stop):
        opt.zero_grad()
        net(rows(number)).square().mean().backward()
        norms.append(torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1).item())
        opt.step()
    return net.state_dict(), norms


def distance(a, b):
    assert set(a) == set(b)
    return max((a[name].double() - b[name].double()).abs().max().item() for name in a)


def trains(ctx, offload):
    model, opt = prepared(ctx, plan=faccel.Plan(offload=offload))
    norms = train(ctx, model, opt, 0, 4)
    return full_state(model.state_dict()), norms


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("offload", [False, True], ids=["device", "host"])
def test_accumulated_and_clipped_updates_equal_torchs_for_every_offload(stage, offload):
    expected, norms = plain(4)
    for state, rank_norms in on(2, trains, offload, zero=stage):
        assert distance(state, expected) < 1e-5
        assert rank_norms == pytest.approx(norms, rel=1e-4)


def without_norm():
    net = Net()
    net.norm = nn.Identity()
    return net


def trains_in_bf16(ctx):
    model, opt = prepared(ctx, without_norm())
    first = full_state(model.state_dict())
    out = model(rows(0))
    train(ctx, model, opt, 0, 8, skip_nonfinite=True)
    return (
        first,
        out.dtype,
        next(faccel.unwrap(model).parameters()).dtype,
        full_state(model.state_dict()),
    )


@pytest.mark.parametrize("stage", STAGES)
def test_bf16_computes_in_bf16_and_keeps_exact_master_weights(stage):
    expected, _ = plain(8)
    for first, out, inside, last in on(2, trains_in_bf16, zero=stage, mixed_precision="bf16"):
        assert (out, inside) == (torch.float32, torch.bfloat16)
        assert {value.dtype for value in first.values()} == {torch.float32}
        assert distance(first, without_norm().state_dict()) == 0
        assert distance(last, {name: expected[name] for name in last}) < 0.1


def saves(ctx, folder):
    model, opt = prepared(ctx)
    train(ctx, model, opt, 0, 3)
    state = {"model": model, "opt": opt, "step": 3}
    faccel.save(state, folder, ctx, step=3)
    exported = full_state(model.state_dict())
    train(ctx, model, opt, 3, 5)
    faccel.save(state | {"step": 5}, folder, ctx, step=5, background=True)
    faccel.latest(folder, ctx)
    return (
        exported,
        full_state(model.state_dict()),
        {k: full_state(v) for k, v in opt.state_dict()["state"].items()},
    )


def resumes(ctx, folder, step, stop):
    model, opt = prepared(ctx, Net(seed=9), lr=0.7)
    state = faccel.load({"model": model, "opt": opt, "step": None}, folder, ctx, step=step)
    loaded = (
        full_state(model.state_dict()),
        {k: full_state(v) for k, v in opt.state_dict()["state"].items()},
    )
    train(ctx, model, opt, state["step"], stop)
    return *loaded, full_state(model.state_dict()), opt.param_groups[0]["lr"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_checkpoint_resumes_on_any_world_size_and_strategy_bit_for_bit(stage, tmp_path):
    at_3, at_5, moments = on(2, saves, str(tmp_path), zero=stage)[0]
    for state, _, last, lr in on(2, resumes, str(tmp_path), 3, 5, zero=stage):
        assert distance(state, at_3) == 0
        assert distance(last, at_5) == 0  # the uninterrupted run
        assert lr == 0.05
    elsewhere = {
        "three ranks": lambda: on(3, resumes, str(tmp_path), 5, 5, zero=stage),
        "another stage": lambda: on(2, resumes, str(tmp_path), 5, 5, zero=stage % 3 + 1),
        "one process": lambda: run_ranks(resumes, 1, str(tmp_path), 5, 5),
        "FSDP2": lambda: run_ranks(resumes, 2, str(tmp_path), 5, 5, mesh="dp_shard=2"),
    }
    for name, run in elsewhere.items():
        for state, states, *_ in run():
            assert distance(state, at_5) == 0, name
            assert states.keys() == moments.keys(), name
            assert max(distance(states[i], moments[i]) for i in moments) == 0, name


def averages(ctx, folder):
    model, opt = prepared(ctx)
    ema = faccel.parallel.init_ema(model, ctx, decay=0.9)
    for number in range(3):
        train(ctx, model, opt, number, number + 1)
        ema = faccel.parallel.update_ema(ema, model, ctx)
    before = full_state(model.state_dict())
    faccel.save({"ema": ema}, folder, ctx, step=3)
    target = {"ema": faccel.parallel.init_ema(model, ctx, decay=0.5)}
    loaded = faccel.load(target, folder, ctx)["ema"]
    with faccel.parallel.ema_weights(model, loaded, ctx), torch.no_grad():
        applied = full_state(model.state_dict())
        output = model(rows(9))
    after = full_state(model.state_dict())
    with torch.no_grad():
        output_after = model(rows(9))
    return full_state(ema.averages), applied, output, before, after, output_after


@pytest.mark.parametrize("stage", STAGES)
def test_moving_averages_equal_those_of_torch_and_are_saved(stage, tmp_path):
    net = Net()
    net.norm.eval()
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    average.update_parameters(net)
    trained = [p for p in net.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(trained, lr=0.05)
    for number in range(3):
        opt.zero_grad()
        net(rows(number)).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(trained, 0.1)
        opt.step()
        average.update_parameters(net)
    expected = average.module.state_dict()
    for values, applied, output, before, after, output_after in on(
        2, averages, str(tmp_path), zero=stage
    ):
        assert sorted(values) == ["a.bias", "a.weight", "b.weight", "c.bias", "c.weight"]
        assert distance(values, {name: expected[name] for name in values}) < 1e-5
        assert distance(applied, expected) < 1e-5
        assert (output - average.module(rows(9))).abs().max() < 1e-5
        assert distance(after, before) == 0
        assert (output_after - net(rows(9))).abs().max() < 1e-5


def gathers(ctx):
    model, opt = prepared(ctx)
    train(ctx, model, opt, 0, 2)
    before = full_state(model.state_dict())
    objects = [id(param) for param in model.parameters()]
    state = faccel.parallel.full_state_dict(model, ctx, rank=1)
    with faccel.parallel.gathered(model, ctx) as params:
        read = {name: param.detach().clone() for name, param in model.named_parameters()}
        assert params.keys() == read.keys()
    with faccel.parallel.gathered(model, ctx, modifier_rank=1), torch.no_grad():
        model.module.b.weight.fill_(ctx.rank)
    assert [id(param) for param in model.parameters()] == objects
    with torch.no_grad():
        output = model(rows(9))
    train(ctx, model, opt, 2, 3)
    return before, state, read, faccel.parallel.full_state_dict(model, ctx, rank=None), output


@pytest.mark.parametrize("stage", STAGES)
def test_full_parameters_are_read_and_written_under_every_stage(stage):
    net = Net()
    net.norm.eval()
    trained = [p for p in net.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(trained, lr=0.05)
    for number in range(3):
        if number == 2:
            expected = {name: value.clone() for name, value in net.state_dict().items()}
            nn.init.ones_(net.b.weight)
            expected_output = net(rows(9)).detach()
        opt.zero_grad()
        net(rows(number)).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(trained, 0.1)
        opt.step()
    results = on(2, gathers, zero=stage)
    for rank, (before, state, read, after, output) in enumerate(results):
        assert distance(before, expected) < 1e-5
        assert state.keys() == (before.keys() if rank == 1 else set())
        assert rank == 0 or distance(state, before) == 0
        assert distance(read, {name: before[name] for name in read}) == 0
        assert (output - expected_output).abs().max() < 1e-5
        assert distance(after, net.state_dict()) < 1e-4


def averages_before_the_engine(ctx):
    model = faccel.wrap(Net(), ctx)
    ema = faccel.parallel.init_ema(model, ctx)
    trained = [p for p in model.parameters() if p.requires_grad]
    faccel.wrap_optimizer(torch.optim.AdamW(trained), model, ctx)
    with pytest.raises(FaccelError, match=r"call `faccel\.parallel\.init_ema` after"):
        faccel.parallel.update_ema(ema, model, ctx)


def test_averages_made_before_the_engine_raise():
    on(2, averages_before_the_engine, zero=2)


@pytest.mark.parametrize("stage", STAGES)
def test_a_checkpoint_of_one_process_resumes_under_zero(stage, tmp_path):
    ((_, at_5, moments),) = run_ranks(saves, 1, str(tmp_path))
    expected, _ = plain(8)
    for state, states, last, _ in on(2, resumes, str(tmp_path), 5, 8, zero=stage):
        assert distance(state, at_5) == 0
        assert max(distance(states[i], moments[i]) for i in moments) == 0
        assert distance(last, expected) < 1e-5


def test_a_bit_that_flipped_in_a_shard_is_detected_and_the_older_checkpoint_loads(tmp_path):
    at_3, *_ = on(2, saves, str(tmp_path))[0]
    shard = sorted((tmp_path / "step-000000005").glob("shard-00002*"))[0]
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    shard.write_bytes(data)
    for state, *_ in on(2, resumes, str(tmp_path), None, 3):
        assert distance(state, at_3) == 0


class Wide(nn.Module):
    def __init__(self, inputs, outputs, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(nn.Linear(inputs, 9), nn.Tanh(), nn.Linear(9, outputs))

    def forward(self, x):
        return self.layers(x)


def gan(ctx):
    """Train a generator and a discriminator, each with an engine."""
    models = [faccel.wrap(Wide(3, 5, seed=1), ctx), faccel.wrap(Wide(5, 1, seed=2), ctx)]
    opts = [
        faccel.wrap_optimizer(torch.optim.AdamW(m.parameters(), lr=0.01), m, ctx) for m in models
    ]
    generator, discriminator = models
    scaler = faccel.init_scaler(ctx)
    for number in range(3):
        real, noise = (faccel.split(rows(number, 8, width), ctx) for width in (5, 3))
        opts[1].zero_grad()
        fake = generator(noise)
        loss = (
            F.softplus(-discriminator(real)).mean()
            + F.softplus(discriminator(fake.detach())).mean()
        )
        scaler = faccel.scaled_backward(loss, scaler, ctx)
        _, scaler = faccel.optimizer_step(opts[1], scaler, ctx, clip_norm=1.0)
        scaler = faccel.scaled_backward(F.softplus(-discriminator(fake)).mean(), scaler, ctx)
        _, scaler = faccel.optimizer_step(opts[0], scaler, ctx, clip_norm=1.0)
    return [full_state(m.state_dict()) for m in models]


def students(ctx):
    """Train a student on the outputs of a frozen teacher, which ZeRO-3 shards, too."""
    teacher = faccel.wrap(Wide(5, 2, seed=3).requires_grad_(False), ctx).eval()
    model = faccel.wrap(Wide(5, 2, seed=4), ctx)
    opt = faccel.wrap_optimizer(
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model, ctx
    )
    scaler = faccel.init_scaler(ctx)
    for number in range(3):
        x = faccel.split(rows(number, 8), ctx)
        with torch.no_grad():
            target = teacher(x)
        scaler = faccel.scaled_backward(F.mse_loss(model(x), target), scaler, ctx)
        _, scaler = faccel.optimizer_step(opt, scaler, ctx)
    return [full_state(m.state_dict()) for m in (model, teacher)]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("loop", [gan, students], ids=["gan", "teacher"])
def test_two_engines_in_one_process_train_as_one_process_does(loop, stage):
    (expected,) = run_ranks(loop, 1)
    for states in on(2, loop, zero=stage):
        for state, want in zip(states, expected, strict=True):
            assert distance(state, want) < 1e-5


def one_rank(ctx):
    model, opt = prepared(ctx)
    train(ctx, model, opt, 0, 2)
    return full_state(model.state_dict())


@pytest.mark.parametrize("stage", [0, 3])
def test_one_process_trains_as_several(stage):
    assert distance(on(1, one_rank, zero=stage)[0], plain(2)[0]) < 1e-5


def schedules(ctx):
    model, opt = prepared(ctx)
    schedule = torch.optim.lr_scheduler.StepLR(opt, 1, gamma=0.5)
    train(ctx, model, opt, 0, 2, scheduler=schedule)
    return opt.param_groups[0]["lr"], opt.base.param_groups[0]["lr"]


def test_a_scheduler_moves_the_optimizer_that_steps():
    assert on(2, schedules)[0] == (
        0.0125,
        0.025,
    )  # what the next update takes, and what the last one took


def meta(ctx):
    if ctx.is_main:
        net = Net()
    else:
        with torch.device("meta"):
            net = Net()
    model, opt = prepared(ctx, net)
    sizes = sum(
        value.to_local().numel()
        for value in model.state_dict().values()
        if hasattr(value, "to_local")
    )
    train(ctx, model, opt, 0, 2)
    return sizes, full_state(model.state_dict())


@pytest.mark.parametrize("stage", [2, 3])
def test_ranks_may_build_the_model_on_meta(stage):
    for sizes, state in on(2, meta, zero=stage):
        assert sizes <= sum(p.numel() for p in Net().parameters()) / 2 + 16
        assert distance(state, plain(2)[0]) < 1e-5


def from_settings(ctx, settings):
    model, opt = prepared(
        ctx, plan=faccel.Plan(deepspeed=faccel.parallel.DeepSpeedConfig(settings=settings))
    )
    train(ctx, model, opt, 0, 2)
    config = opt.engine.config
    return {
        key: config.get(key) for key in ("zero_optimization", "train_batch_size", "bf16")
    }, full_state(model.state_dict())


AUTO = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto", "loss_scale": 0},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": [0.9, 0.999], "weight_decay": 0.01},
    },
    "zero_optimization": {
        "stage": "auto",
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "contiguous_gradients": True,
        "offload_optimizer": {"device": "cpu"},
    },
}


def test_the_users_own_json_is_filled_in(tmp_path):
    path = tmp_path / "ds_config.json"
    path.write_text(json.dumps(AUTO))
    for config, state in on(2, from_settings, str(path), zero=3):
        assert config["zero_optimization"]["stage"] == 3
        assert config["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
        assert config["bf16"]["enabled"] is False
        assert distance(state, plain(2)[0]) < 1e-5


WRONG = {
    "a key that is none": ({"zero_optimisation": {}}, "`zero_optimization`"),
    "a key of zero that is none": ({"zero_optimization": {"stag": 2}}, "`stage`"),
    "another stage": ({"zero_optimization": {"stage": 3}}, "zero=2"),
    "another precision": ({"bf16": {"enabled": True}}, "mixed_precision=no"),
    "another accumulation": ({"gradient_accumulation_steps": 4}, "grad_accum=1"),
    "another batch": (
        {"train_batch_size": 9, "train_micro_batch_size_per_gpu": 4},
        "`train_batch_size` 9",
    ),
    "another optimizer": ({"optimizer": {"type": "Lamb"}}, "a AdamW"),
    "another rate": ({"optimizer": {"type": "AdamW", "params": {"lr": 0.5}}}, "lr=0.05"),
    "a scheduler": ({"scheduler": {"type": "WarmupLR"}}, "scheduler=...)"),
    "its own accumulation": ({"managed_gradient_accumulation": True}, "`faccel.windows`"),
    "parameters of ZeRO-2 elsewhere": (
        {"zero_optimization": {"offload_param": {"device": "cpu"}}},
        "zero=3",
    ),
    "a disk": (
        {"zero_optimization": {"offload_optimizer": {"device": "nvme", "nvme_path": "scratch"}}},
        "NVMe",
    ),
    "an auto without a value": ({"steps_per_print": "auto"}, "steps_per_print"),
    "another limit": ({"gradient_clipping": 3.0}, "clip_norm=0.1"),
}


def every_mistake(ctx):
    errors = {}
    for name, (settings, _) in WRONG.items():
        try:
            from_settings(ctx, settings)
            errors[name] = None
        except FaccelError as error:
            errors[name] = (type(error).__name__, str(error))
    return errors


def test_invalid_or_contradictory_settings_are_an_error_that_names_both():
    for errors in on(2, every_mistake):
        for name, (_, word) in WRONG.items():
            assert errors[name] is not None, name
            assert errors[name][0] == "ConfigError"
            assert word in errors[name][1], (name, errors[name])


BACKWARD_OPTIONS = [{"retain_graph": True}, {"create_graph": True}, {"inputs": torch.ones(1)}]


def misuses(ctx):
    def kind_of(body):
        try:
            body()
        except FaccelError as error:
            return type(error).__name__, error.fix
        return None

    def adafactor(settings=None):
        model = faccel.wrap(Wide(5, 2, seed=1), ctx)
        return faccel.wrap_optimizer(torch.optim.Adafactor(model.parameters()), model, ctx)

    def backward(options):
        faccel.scaled_backward(model(rows(0)).mean(), scaler, ctx, **options)

    model, opt = prepared(ctx)
    untied = faccel.wrap(Wide(5, 2, seed=1), ctx)
    loose = torch.optim.SGD(untied.parameters(), lr=0.1)
    scaler = faccel.scaled_backward(model(rows(0)).mean(), faccel.init_scaler(ctx), ctx)
    early = torch.optim.SGD(untied.parameters(), lr=0.1)
    torch.optim.lr_scheduler.StepLR(early, 1)
    return [
        kind_of(adafactor),
        kind_of(lambda: untied(rows(0))),
        kind_of(lambda: faccel.optimizer_step(loose, scaler, ctx)),
        kind_of(lambda: faccel.optimizer_step(opt, scaler, ctx, clip_value=1.0)),
        kind_of(
            lambda: faccel.wrap_optimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, ctx)
        ),
        kind_of(lambda: faccel.wrap_optimizer(early, untied, ctx)),
        kind_of(lambda: faccel.wrap(Wide(5, 2, seed=1).double(), ctx)),
        kind_of(lambda: faccel.parallel.local_sgd(model, ctx, step=1, every=1)),
        kind_of(lambda: faccel.parallel.join(model, opt, ctx).__enter__()),
        *[kind_of(functools.partial(backward, options)) for options in BACKWARD_OPTIONS],
    ]


def test_unsupported_uses_of_zero_are_errors_with_a_fix():
    for errors in on(2, misuses):
        assert [kind for kind, _ in errors] == [
            "OptimizerError", "ModelError", "OptimizerError", "ConfigError", "OptimizerError",
            "OptimizerError", "ModelError", "ConfigError", "ConfigError",
            "ModelError", "ModelError", "ModelError",
        ]  # fmt: skip
        assert all(fix for _, fix in errors)
