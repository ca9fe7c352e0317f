"""Each schedule of PyTorch equals one process: training, inference, checkpoints, short windows."""

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils.data import DataLoader

import faccel
from faccel.errors import ConfigError, ModelError
from faccel.parallel import PipelineConfig
from faccel.plan import SCHEDULES, SPLIT_BACKWARD_SCHEDULES, V_SCHEDULES
from faccel.testing import simulate
from tests.models import loss_of, model, tokens
from tests.training import CHAIN, differences, full, train

SLOW = pytest.mark.slow
pytestmark = pytest.mark.filterwarnings("ignore")  # advice of torch on layouts
STAGES = {"1f1b": 1, "gpipe": 1} | {name: 2 for name in SCHEDULES if name not in ("1f1b", "gpipe")}
LOOPS = [name for name in SCHEDULES if name not in V_SCHEDULES]


def size_of(mesh):
    return faccel.MeshSpec.of(mesh).size


def plan_of(schedule, stages=None, **options):
    pipeline = PipelineConfig(
        chain=CHAIN, schedule=schedule, stages_per_rank=stages or STAGES[schedule]
    )
    return faccel.Plan(**{"units": "Block", "pipeline": pipeline, **options})


def is_tied(schedule):
    # The first and the last stage of a V are on one rank, which refuses tied weights.
    return schedule not in V_SCHEDULES


@pytest.fixture(scope="module")
def one():
    """What one process computes, by the options of `train`."""
    results = {}

    def reference(**options):
        key = str(sorted(options.items(), key=str))
        if key not in results:
            (results[key],) = simulate(lambda ctx: train(ctx, **options), 1)
        return results[key]

    return reference


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("mesh", ["pp=2", "pp=2,dp_shard=2"])
def test_in_fp64_with_accumulation(schedule, mesh, one):
    options = {"tied": is_tied(schedule)}
    plan = plan_of(schedule)
    for got in simulate(lambda ctx: train(ctx, plan, **options), size_of(mesh), mesh=mesh):
        far = differences(got, one(**options))
        assert max(far.values()) < 1e-10, far


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_with_activation_checkpointing(schedule, one):
    options = {"tied": is_tied(schedule)}
    plan = plan_of(schedule, activation_checkpoint="full")
    for got in simulate(lambda ctx: train(ctx, plan, **options), 2, mesh="pp=2"):
        far = differences(got, one(**options))
        assert max(far.values()) < 1e-10, far


@pytest.mark.parametrize("schedule", SPLIT_BACKWARD_SCHEDULES)
@pytest.mark.parametrize("accum", [2, 8])
def test_a_split_backward_with_more_stages_and_other_windows(schedule, accum, one):
    # A rank may run forward of one micro-batch between both halves of the backward of another:
    # units that had freed their parameters there had no gradients.
    num_stages = 2
    if schedule in LOOPS:
        num_stages = 4
    accum = max(accum, 2 * num_stages if schedule == "dualpipev" else 2)

    def run(ctx, plan):
        torch.manual_seed(0)
        # More stages of a rank than torch keeps gathered at a time, which is 3.
        layers = [layer for _ in range(4) for layer in (nn.Linear(4, 4), nn.Tanh())]
        net = nn.Sequential(*layers).double()
        wrapped, scaler = faccel.wrap(net, ctx, plan=plan), faccel.init_scaler(ctx)
        rows = torch.linspace(-1, 1, 16 * accum, dtype=torch.float64).reshape(-1, 4)
        loader = faccel.shard(DataLoader(rows, 4 // ctx.data_world_size), ctx)
        for window in faccel.windows(loader, ctx, size=accum):
            losses, _ = faccel.forward_backward(
                lambda net, batch: net(batch.data).square().mean(), wrapped, window, scaler, ctx
            )
        grads = {name: full(p.grad) for name, p in wrapped.named_parameters()}
        return faccel.reduce(losses, ctx, op="mean", axis="loss").tolist(), grads

    ((losses, grads),) = simulate(run, 1, faccel.Plan())
    pipeline = PipelineConfig(chain=("*",), schedule=schedule, stages_per_rank=num_stages)
    plan = faccel.Plan(units="Linear", pipeline=pipeline)
    names = set()
    for other_losses, other_grads in simulate(run, 4, plan, mesh="pp=2,dp_shard=2"):
        assert other_losses == pytest.approx(losses, abs=1e-12)
        names.update(other_grads)
        for name, grad in other_grads.items():
            assert (grad - grads[name]).abs().max() < 1e-12, name
    assert names == set(grads)


@pytest.mark.parametrize("schedule", ["looped-bfs", "zbv"])
@pytest.mark.parametrize("num_ranks", [2, pytest.param(3, marks=SLOW)])
def test_inference_of_batches_of_any_size(schedule, num_ranks):
    def infer(ctx):
        wrapped = faccel.wrap(model(depth=3, tied=False), ctx, plan=plan_of(schedule))
        with torch.no_grad():
            return [wrapped(tokens(rows)[:, :-1]) for rows in range(1, 9)]

    reference = model(depth=3, tied=False)
    for outputs in simulate(infer, num_ranks, mesh=f"pp={num_ranks}"):
        for rows, output in enumerate(outputs, start=1):
            assert (output - reference(tokens(rows)[:, :-1])).abs().max() < 1e-12


NEXT = list(zip(SCHEDULES, SCHEDULES[1:] + SCHEDULES[:1], strict=True))


@pytest.mark.parametrize(("saved", "loaded"), NEXT)
def test_a_checkpoint_of_a_schedule_loads_with_another(saved, loaded, tmp_path):
    def step(ctx, wrapped, opt, seed):
        loader = faccel.shard(DataLoader(tokens(8, seed=seed), 2), ctx)
        window = next(faccel.windows(loader, ctx, size=4))
        _, scaler = faccel.forward_backward(
            lambda net, batch: loss_of(net(batch.data[:, :-1]), batch.data[:, 1:]),
            wrapped, window, faccel.init_scaler(ctx), ctx,
        )  # fmt: skip
        faccel.optimizer_step(opt, scaler, ctx)

    def run(ctx, plan, seeds, *, saves=False, loads=False):
        wrapped = faccel.wrap(model(tied=False), ctx, plan=plan)
        opt = faccel.wrap_optimizer(torch.optim.AdamW(wrapped.parameters(), lr=0.1), wrapped, ctx)
        if loads:
            faccel.load({"model": wrapped, "opt": opt}, str(tmp_path), ctx)
        for seed in seeds:
            step(ctx, wrapped, opt, seed)
        if saves:
            faccel.save({"model": wrapped, "opt": opt}, str(tmp_path), ctx, step=1)
        return {name: full(p) for name, p in wrapped.named_parameters()}

    (one,) = simulate(lambda ctx: run(ctx, faccel.Plan(), (1, 2)), 1)
    simulate(lambda ctx: run(ctx, plan_of(saved), (1,), saves=True), 2, mesh="pp=2")
    names = set()
    for params in simulate(lambda ctx: run(ctx, plan_of(loaded), (2,), loads=True), 2, mesh="pp=2"):
        for name, param in params.items():
            names.add(name)
            assert (param - one[name]).abs().max() < 1e-10, name
    assert names == set(one)


# A window that is too short, at the end of an epoch, and the error where it is the first one.
SHORT = {
    "1f1b": (1, "at least as many micro-batches as ranks"),
    "interleaved": (5, "a multiple of the number of ranks"),
    "interleaved-zero-bubble": (5, "a multiple of the number of ranks"),
    "dualpipev": (3, "at least as many micro-batches as stages"),
}


@pytest.mark.parametrize("schedule", SHORT)
def test_an_unsupported_number_of_micro_batches_is_an_error_and_runs_as_a_tail(schedule):
    size, needs = SHORT[schedule]

    def run(ctx, plan, sizes):
        wrapped, scaler = faccel.wrap(model(tied=False), ctx, plan=plan), faccel.init_scaler(ctx)
        values = []
        for size in sizes:
            loader = faccel.shard(DataLoader(tokens(2 * size), 2), ctx)
            window = next(faccel.windows(loader, ctx, size=size))
            losses, _ = faccel.forward_backward(
                lambda net, batch: loss_of(net(batch.data[:, :-1]), batch.data[:, 1:]),
                wrapped, window, scaler, ctx,
            )  # fmt: skip
            values += losses.tolist()
        grads = [full(p.grad).norm().item() ** 2 for p in wrapped.parameters()]
        norms = faccel.reduce(torch.tensor(sum(grads), dtype=torch.float64), ctx, axis="pp")
        return [*values, norms.item()]

    plan = plan_of(schedule)
    with pytest.raises(ConfigError, match=needs) as info:
        simulate(run, 2, plan, (size,), mesh="pp=2")
    (one,) = simulate(run, 1, faccel.Plan(), (4, size))
    for values in simulate(run, 2, plan, (4, size), mesh="pp=2"):
        assert values == pytest.approx(one, abs=1e-10)
    number = int(info.value.fix.split("grad_accum=")[1].split("`")[0])
    assert len(simulate(run, 2, plan, (number,), mesh="pp=2")[0]) == number + 1


@pytest.mark.parametrize("schedule", ["gpipe", "looped-bfs", "zbv"])
@pytest.mark.parametrize("size", [1, 3])
def test_other_schedules_run_any_number_of_micro_batches(schedule, size, one):
    options = {"tied": False, "accum": size, "rows": 12}
    for got in simulate(lambda ctx: train(ctx, plan_of(schedule), **options), 2, mesh="pp=2"):
        assert max(differences(got, one(**options)).values()) < 1e-10


BAD = {
    "one stage for 1f1b": (dict(schedule="1f1b", stages=2), {}, "must be 1"),
    "one stage for gpipe": (dict(schedule="gpipe", stages=2), {}, "must be 1"),
    "two stages for zbv": (dict(schedule="zbv", stages=1), {}, "must be 2"),
    "two stages for dualpipev": (dict(schedule="dualpipev", stages=3), {}, "must be 2"),
    "compile": (dict(schedule="zbv"), {"compile": "units"}, "`compile` is unsupported"),
    "reshard": (
        dict(schedule="interleaved-zero-bubble"),
        {"fsdp": faccel.parallel.FsdpConfig(reshard_after_forward=True)},
        "`reshard_after_forward` must be False",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_an_impossible_plan_is_an_error(name):
    pipeline, options, problem = BAD[name]
    with pytest.raises(ConfigError, match=problem):
        plan_of(**pipeline, **options)


def test_tied_weights_of_the_first_and_the_last_stage_of_a_v_are_an_error():
    with pytest.raises(ModelError, match="two stages of one rank have the same parameter"):
        simulate(lambda ctx: faccel.wrap(model(), ctx, plan=plan_of("zbv")), 2, mesh="pp=2")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_has_aux_and_a_hook_of_a_parameter(schedule):
    def run(ctx, plan):
        wrapped, scaler = faccel.wrap(model(tied=False), ctx, plan=plan), faccel.init_scaler(ctx)
        for name, param in wrapped.named_parameters():
            if name == "blocks.1.up.weight":
                param.register_hook(lambda grad: 2 * grad)
        loader = faccel.shard(DataLoader(tokens(8), 2), ctx)
        window = next(faccel.windows(loader, ctx, size=4))

        def loss_fn(net, batch):
            loss = loss_of(net(batch.data[:, :-1]), batch.data[:, 1:])
            return loss, {"sum": batch.data.sum().item()}

        (_, auxs), _ = faccel.forward_backward(loss_fn, wrapped, window, scaler, ctx, has_aux=True)
        grads = dict(wrapped.named_parameters())
        grad = grads.get("blocks.1.up.weight")
        return auxs, None if grad is None else full(grad.grad)

    ((auxs, expected),) = simulate(run, 1, faccel.Plan())
    grads = []
    for other_auxs, grad in simulate(run, 2, plan_of(schedule), mesh="pp=2"):
        assert other_auxs == auxs
        if grad is not None:
            grads.append(grad)
    assert (grads[0] - expected).abs().max() < 1e-10


def test_a_split_backward_in_bf16_has_the_gradients_of_parameters_cast_by_hand():
    num_micro_batches = 16

    def run(ctx):
        net = model(torch.float32, tied=False)
        wrapped = faccel.wrap(net, ctx, plan=plan_of("zbv"))
        dtypes = set()
        for name, module in net.named_modules():
            if name == "blocks.0.up":
                module.register_forward_hook(lambda module, args, out: dtypes.add(out.dtype))
        loader = faccel.shard(DataLoader(tokens(2 * num_micro_batches), 2), ctx)
        window = next(faccel.windows(loader, ctx, size=num_micro_batches))
        losses, _ = faccel.forward_backward(
            lambda net, batch: loss_of(net(batch.data[:, :-1]), batch.data[:, 1:]),
            wrapped, window, faccel.init_scaler(ctx), ctx,
        )  # fmt: skip
        return losses, {name: full(p.grad) for name, p in wrapped.named_parameters()}, dtypes

    net = model(torch.float32, tied=False)
    expected_losses = []
    for batch in tokens(2 * num_micro_batches).split(2):
        params = {name: param.bfloat16() for name, param in net.named_parameters()}
        output = functional_call(net, params, (batch[:, :-1],)).float()
        loss = loss_of(output, batch[:, 1:])
        (loss / num_micro_batches).backward()
        expected_losses.append(loss.item())
    results = simulate(run, 2, mesh="pp=2", config={"mixed_precision": "bf16"})
    error, norm, dtypes = 0.0, 0.0, set()
    for losses, grads, dtypes_of_rank in results:
        assert losses.tolist() == pytest.approx(expected_losses, abs=0.01)
        dtypes |= dtypes_of_rank
        for name, grad in grads.items():
            # The shards stay in fp32.
            assert grad.dtype == torch.float32
            expected = net.get_parameter(name).grad
            error += (grad - expected).square().sum().item()
            norm += expected.square().sum().item()
    assert dtypes == {torch.bfloat16}
    assert error < 0.01**2 * norm
