"""Mistakes of a newcomer: each error names the argument, the value and a fix, and the fix works."""

import importlib
import inspect
import re

import attrs
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import faccel
from faccel import errors
from faccel.testing import fake_context


@attrs.frozen
class Mistake:
    """One mistake, the error that it raises, and the fix that the message suggests.

    Args:
        code: What the newcomer writes.
        error: The class of the error.
        argument: The name that the message has in backticks.
        got: The value that the message repeats.
        fix: Code that the message suggests, in backticks.
        wrong: The part of `code` that `fix` replaces.
        fixed: The code after the fix, where `fix` is only a part of it.
    """

    code: str
    error: type[Exception]
    argument: str
    got: str
    fix: str
    wrong: str | None = None
    fixed: str | None = None

    def fixed_code(self):
        """Return the code after the fix."""
        if self.fixed is not None:
            assert self.fix in self.fixed
            return self.fixed
        assert self.code.count(self.wrong) == 1
        return self.code.replace(self.wrong, self.fix)


CONFIG, DATA, MODEL = errors.ConfigError, errors.DataError, errors.ModelError
OPTIMIZER, SCALER = errors.OptimizerError, errors.ScalerError
CHECKPOINT, TREE = errors.CheckpointError, errors.TreeError

FP16 = """\
ctx = faccel.init(device="cpu", mixed_precision="fp16", env={})
model = faccel.wrap(net, ctx)
opt = faccel.wrap_optimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, ctx)
loss = F.cross_entropy(model(x), y)
scaler = faccel.scaled_backward(loss, faccel.init_scaler(ctx), ctx)
"""
TWO_RANKS = """\
def train(ctx):
    net = torch.nn.Linear(4, 2)
    {line}
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = model(torch.ones(2, 4)).mean()
    scaler = faccel.scaled_backward(loss, faccel.init_scaler(ctx), ctx)
    faccel.optimizer_step(opt, scaler, ctx)
faccel.testing.simulate(train, 2)
"""
ACCUMULATED = """\
ctx = faccel.init(device="cpu", env={{"FACCEL_GRAD_ACCUM": "8"}})
model = faccel.wrap(net, ctx)
opt = torch.optim.SGD(model.parameters(), lr=0.1)
loss = model(x).mean()
for window in {call}: pass
"""
EARLY_OPTIMIZER = """\
ctx = faccel.init(device="cpu", debug=True, env={{}})
SGD = torch.optim.SGD
{lines}
opt = faccel.wrap_optimizer(opt, model, ctx)
"""
MISTAKES = [
    # Data
    Mistake("faccel.shard(loader, ctx, tail='padding')", DATA, "tail", "padding", "pad", "padding"),
    Mistake(
        "faccel.shard([x], ctx, mode='dispach')", DATA, "mode", "dispach", "dispatch", "dispach"
    ),
    Mistake(
        "faccel.shard(dataset[0], ctx, tail='drop').at(0).resume(7)",
        DATA,
        "cursor",
        "7",
        "faccel.Cursor(epoch)",
        fixed="faccel.shard(loader, ctx, tail='drop').resume(faccel.Cursor(epoch))",
    ),
    Mistake(
        "faccel.shard(len, ctx)",
        DATA,
        "loader",
        "builtin_function_or_method",
        "faccel.shard(DataLoader(dataset, batch_size=32), ctx)",
        "faccel.shard(len, ctx)",
    ),
    Mistake(
        "faccel.shard(ctx, loader)",
        CONFIG,
        "ctx",
        "DataLoader",
        "faccel.shard(loader, ctx)",
        "faccel.shard(ctx, loader)",
    ),
    Mistake(
        "for window in faccel.windows(loader, ctx): pass",
        DATA,
        "loader",
        "DataLoader",
        "faccel.windows(faccel.shard(loader, ctx).at(epoch), ctx)",
        "faccel.windows(loader, ctx)",
    ),
    Mistake(
        "list(faccel.windows(train.at(0), ctx, size=0))", CONFIG, "size", "0", "size=1", "size=0"
    ),
    Mistake(
        "list(faccel.batches(loader))",
        DATA,
        "loader",
        "DataLoader",
        "faccel.batches(faccel.shard(loader, ctx).at(epoch))",
        "faccel.batches(loader)",
    ),
    Mistake(
        "loader = faccel.shard(loader, ctx)\nfor batch in loader: pass",
        DATA,
        "loader",
        "ShardedLoader",
        "for batch in loader.at(epoch)",
        "for batch in loader",
    ),
    # Models and optimizers
    Mistake(
        "faccel.wrap(ctx, net)",
        MODEL,
        "model",
        "DistContext",
        "faccel.wrap(model, ctx)",
        fixed="model = net\nfaccel.wrap(model, ctx)",
    ),
    Mistake(
        "faccel.wrap(net, ctx, plan={'units': 'Linear'})",
        CONFIG,
        "plan",
        "dict",
        "plan=faccel.Plan()",
        "plan={'units': 'Linear'}",
    ),
    Mistake(
        "faccel.grad_sync(net, on=True)",
        MODEL,
        "model",
        "Linear",
        "model = faccel.wrap(net, ctx)",
        fixed="model = faccel.wrap(net, ctx)\nfaccel.grad_sync(model, on=True)",
    ),
    Mistake(
        "faccel.wrap_optimizer(torch.optim.SGD(net.parameters(), lr=0.1), model, ctx)",
        OPTIMIZER,
        "opt",
        "SGD",
        "model.parameters()",
        "net.parameters()",
    ),
    Mistake(
        "faccel.wrap_optimizer(model, opt, ctx)",
        OPTIMIZER,
        "opt",
        "WrappedModel",
        "faccel.wrap_optimizer(opt, model, ctx)",
        "faccel.wrap_optimizer(model, opt, ctx)",
    ),
    # One update
    Mistake(
        "loss = F.cross_entropy(model(x), y, reduction='none')\n"
        "faccel.scaled_backward(loss, scaler, ctx)",
        MODEL,
        "loss",
        "shape (8,)",
        "loss.mean()",
        fixed="loss = F.cross_entropy(model(x), y, reduction='none')\n"
        "faccel.scaled_backward(loss.mean(), scaler, ctx)",
    ),
    Mistake(
        "faccel.scaled_backward(loss.item(), scaler, ctx)",
        MODEL,
        "loss",
        "float",
        "loss",
        "loss.item()",
    ),
    Mistake(
        "with torch.no_grad():\n    loss = model(x).mean()\n"
        "faccel.scaled_backward(loss, scaler, ctx)",
        MODEL,
        "loss",
        "requires_grad=False",
        "torch.enable_grad()",
        "torch.no_grad()",
    ),
    Mistake(
        "faccel.scaled_backward(loss, ctx, scaler)",
        CONFIG,
        "ctx",
        "ScalerState",
        "scaler = faccel.scaled_backward(loss, scaler, ctx)",
        "faccel.scaled_backward(loss, ctx, scaler)",
    ),
    Mistake(
        "faccel.optimizer_step(opt, scaler, ctx)",
        OPTIMIZER,
        "opt",
        "`.grad`",
        "scaler = faccel.scaled_backward(loss, scaler, ctx)",
        fixed="scaler = faccel.scaled_backward(loss, scaler, ctx)\n"
        "faccel.optimizer_step(opt, scaler, ctx)",
    ),
    Mistake(
        "loss.backward()\nfaccel.optimizer_step(opt, scaler, ctx)",
        SCALER,
        "scaler",
        "ScalerState",
        "scaler = faccel.scaled_backward(loss, scaler, ctx)",
        "loss.backward()",
    ),
    Mistake(
        "scaler = faccel.scaled_backward(loss, scaler, ctx)\n"
        "faccel.optimizer_step(opt, scaler, ctx, clip_norm=-1.0)",
        CONFIG,
        "clip_norm",
        "-1.0",
        "clip_norm=1.0",
        "clip_norm=-1.0",
    ),
    Mistake(
        "plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(opt)\nmetric = 0.5\n"
        "scaler = faccel.scaled_backward(loss, scaler, ctx)\n"
        "faccel.optimizer_step(opt, scaler, ctx, scheduler=plateau)",
        CONFIG,
        "scheduler",
        "ReduceLROnPlateau",
        "plateau.step(metric)",
        fixed="plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(opt)\nmetric = 0.5\n"
        "scaler = faccel.scaled_backward(loss, scaler, ctx)\n"
        "faccel.optimizer_step(opt, scaler, ctx)\nplateau.step(metric)",
    ),
    Mistake(
        "faccel.init_scaler(ctx, growth=2.0)", CONFIG, "growth", "2.0", "growth_factor", "growth"
    ),
    # Configuration
    Mistake(
        "faccel.init(mixed_precision='int8', env={})",
        CONFIG,
        "mixed_precision",
        "int8",
        "bf16",
        "int8",
    ),
    Mistake(
        "faccel.init(grad_acum=4, env={})", CONFIG, "grad_acum", "4", "grad_accum", "grad_acum"
    ),
    Mistake("faccel.init(mesh='dp=1', env={})", CONFIG, "mesh", "dp=1", "dp_replicate", "dp"),
    Mistake("faccel.init(mesh='tp=4', env={})", CONFIG, "mesh", "tp=4", "tp=1", "tp=4"),
    Mistake("faccel.init(device='gpu', env={})", errors.DeviceError, "device", "gpu", "cpu", "gpu"),
    Mistake(
        "faccel.init(env={'FACCEL_MIXED_PRECISION': 'half'})",
        CONFIG,
        "mixed_precision",
        "half",
        "fp16",
        "half",
    ),
    Mistake(
        "faccel.init(env={'FACCEL_SEEDS': '1'})",
        CONFIG,
        "FACCEL_SEEDS",
        "1",
        "FACCEL_SEED",
        "FACCEL_SEEDS",
    ),
    Mistake(
        "faccel.init(zero=2, env={})",
        CONFIG,
        "zero",
        "2",
        'strategy="deepspeed"',
        fixed='faccel.Config(zero=2, strategy="deepspeed")',
    ),
    # Plans
    Mistake(
        "faccel.Plan(activation_checkpoint='all')",
        CONFIG,
        "activation_checkpoint",
        "all",
        'activation_checkpoint="full"',
        "activation_checkpoint='all'",
    ),
    Mistake(
        "faccel.Plan(tensor={'up': 'column'})",
        CONFIG,
        'tensor["up"]',
        "column",
        "colwise",
        "column",
    ),
    Mistake(
        "faccel.parallel.DdpConfig(comm_hook='fp8')", CONFIG, "comm_hook", "fp8", "fp16", "fp8"
    ),
    Mistake(
        "faccel.parallel.PipelineConfig(chain=('0',), schedule='1F1B')",
        CONFIG,
        "schedule",
        "1F1B",
        "1f1b",
        "1F1B",
    ),
    # Collectives
    Mistake("faccel.reduce(x, ctx, op='avg')", CONFIG, "op", "avg", "mean", "avg"),
    Mistake("faccel.reduce(x, ctx, axis='tensor')", CONFIG, "axis", "tensor", "data", "tensor"),
    Mistake(
        "faccel.gather({'loss': 0.5}, ctx)",
        TREE,
        "x",
        "float",
        "faccel.gather_objects",
        "faccel.gather",
    ),
    Mistake(
        "faccel.gather(x, ctx, num_valid=100)",
        DATA,
        "num_valid",
        "100",
        "num_valid=batch.num_valid",
        fixed="batch = next(faccel.batches(train.at(0)))\n"
        "faccel.gather(batch.data, ctx, num_valid=batch.num_valid)",
    ),
    Mistake("faccel.agree(ctx, stop='no')", CONFIG, "stop", "'no'", "stop=False", "stop='no'"),
    Mistake(
        "faccel.agree(ctx, nan=x.isnan())",
        CONFIG,
        "nan",
        "nan.ndim=2",
        "nan=value.any()",
        fixed="value = x.isnan()\nfaccel.agree(ctx, nan=value.any())",
    ),
    Mistake("faccel.broadcast(x, ctx, src=7)", CONFIG, "src", "7", "src=0", "src=7"),
    Mistake(
        "xs = range(5)\nfaccel.split(xs, ctx)",
        DATA,
        "xs",
        "range",
        "list(xs)",
        fixed="xs = range(5)\nfaccel.split(list(xs), ctx)",
    ),
    # Checkpoints
    Mistake(
        "faccel.save(path, state, ctx, step=1)",
        CONFIG,
        "path",
        "dict",
        "faccel.save(state, path, ctx, step=step)",
        "faccel.save(path, state, ctx, step=1)",
    ),
    Mistake(
        "faccel.load(path, state, ctx)",
        CONFIG,
        "path",
        "dict",
        "faccel.load(state, path, ctx)",
        fixed="faccel.save(state, path, ctx, step=1)\nfaccel.load(state, path, ctx)",
    ),
    Mistake("faccel.save(state, path, ctx, step=-1)", CONFIG, "step", "-1", "step=100", "step=-1"),
    Mistake(
        "faccel.save(state, path, ctx, step=1, keep=0)", CONFIG, "keep", "0", "keep=3", "keep=0"
    ),
    Mistake(
        "faccel.load(state, path, ctx)",
        CHECKPOINT,
        "path",
        "steps: none",
        "faccel.latest(path, ctx)",
        fixed="if faccel.latest(path, ctx): faccel.load(state, path, ctx)",
    ),
    Mistake(
        "faccel.checkpoint.keep_best(1, 'accuracy', mode='maximum')",
        CONFIG,
        "mode",
        "maximum",
        "max",
        "maximum",
    ),
    Mistake(
        "faccel.save(state, 's3://bucket/run', ctx, step=1)",
        CONFIG,
        "path",
        "s3://bucket/run",
        'path="local"',
        fixed='faccel.save(state, path="local", ctx=ctx, step=1)',
    ),
    # The state of an update
    Mistake(
        "faccel.wrap(model, ctx)",
        MODEL,
        "model",
        "WrappedModel",
        "WrappedModel",
        fixed="assert isinstance(model, faccel.WrappedModel)",
    ),
    Mistake(
        FP16 + "opt.step()",
        SCALER,
        "opt.step()",
        "SGD",
        "info, scaler = faccel.optimizer_step(opt, scaler, ctx)",
        fixed=FP16 + "info, scaler = faccel.optimizer_step(opt, scaler, ctx)",
    ),
    # Mistakes that trained in silence
    Mistake(
        "model = faccel.wrap(net, ctx)\nother = faccel.wrap(net, ctx)",
        MODEL,
        "model",
        "`weight` of a Linear",
        "model = faccel.rewrap(model, ctx)",
        fixed="model = faccel.wrap(net, ctx)\nmodel = faccel.rewrap(model, ctx)",
    ),
    Mistake(
        TWO_RANKS.format(line="model = net"),
        OPTIMIZER,
        "opt",
        "which no wrapped model has",
        "model = faccel.wrap(net, ctx)",
        "model = net",
    ),
    Mistake(
        ACCUMULATED.format(call="faccel.windows(train.at(0), ctx, size=2)"),
        CONFIG,
        "grad_accum",
        "size=2, grad_accum=8",
        "faccel.windows(loader, ctx)",
        fixed="loader = train.at(0)\n" + ACCUMULATED.format(call="faccel.windows(loader, ctx)"),
    ),
    Mistake(
        ACCUMULATED.format(call="[]")
        + "scaler = faccel.scaled_backward(loss, scaler, ctx)\n"
        + "faccel.optimizer_step(opt, scaler, ctx)",
        CONFIG,
        "grad_accum",
        "grad_accum=8",
        "for window in faccel.windows(loader, ctx)",
        fixed=ACCUMULATED.format(call="[]") + "loader = train.at(0)\n"
        "for window in faccel.windows(loader, ctx):\n"
        "    for micro in window:\n"
        "        loss = F.cross_entropy(model(micro.data[0]), micro.data[1])\n"
        "        scaler = faccel.scaled_backward(loss, scaler, ctx, scale=micro.scale)\n"
        "    _, scaler = faccel.optimizer_step(opt, scaler, ctx)",
    ),
    Mistake(
        EARLY_OPTIMIZER.format(lines="opt = SGD(net.parameters())\nmodel = faccel.wrap(net, ctx)"),
        OPTIMIZER,
        "opt",
        "SGD",
        "model.parameters()",
        fixed=EARLY_OPTIMIZER.format(
            lines="model = faccel.wrap(net, ctx)\nopt = SGD(model.parameters())"
        ),
    ),
    Mistake(
        "list(faccel.batches(faccel.shard(DataLoader([], 4), ctx).at(0)))",
        DATA,
        "loader",
        "0 samples",
        'tail="pad"',
        fixed='list(faccel.batches(faccel.shard(DataLoader(dataset, 4), ctx, tail="pad").at(0)))',
    ),
    Mistake(
        "faccel.optimizer_step(ctx, opt, scaler)",
        CONFIG,
        "ctx",
        "ScalerState",
        "info, scaler = faccel.optimizer_step(opt, scaler, ctx)",
        fixed="scaler = faccel.scaled_backward(loss, scaler, ctx)\n"
        "info, scaler = faccel.optimizer_step(opt, scaler, ctx)",
    ),
    Mistake(
        "list(faccel.shard(DataLoader([], 4), ctx).at(0))",
        DATA,
        "loader",
        "0 samples",
        'tail="pad"',
        fixed='list(faccel.shard(DataLoader(dataset, 4), ctx, tail="pad").at(0))',
    ),
    # Trackers
    Mistake(
        "faccel.tracking.log(trackers, {'loss': loss}, step=step)",
        CONFIG,
        "values",
        "Trackers",
        'log({"loss": loss}, trackers, step=step)',
        fixed='faccel.tracking.log({"loss": loss}, trackers, step=step)',
    ),
    Mistake(
        "faccel.tracking.finish(faccel.tracking.init_trackers('run', ctx, trackers='jsonl'))",
        CONFIG,
        "trackers",
        "jsonl",
        'trackers=("jsonl",)',
        "trackers='jsonl'",
    ),
    Mistake(
        "faccel.tracking.init_trackers(ctx, 'run')",
        CONFIG,
        "ctx",
        "'run'",
        "faccel.tracking.init_trackers(run, ctx)",
        fixed="run = 'run'\n"
        "faccel.tracking.finish(faccel.tracking.init_trackers(run, ctx))"
        " # faccel.tracking.init_trackers(run, ctx)",
    ),
    # The rest of the library
    Mistake(
        "faccel.launch('train.py')",
        errors.LaunchError,
        "fn",
        "train.py",
        "faccel.launch(train, num_processes=2)",
        fixed="def train(ctx): return 0\n"
        "faccel.launch(train, num_processes=1) # as in faccel.launch(train, num_processes=2)",
    ),
    Mistake(
        "faccel.seed_everything('0', ctx)",
        CONFIG,
        "seed",
        "'0'",
        "faccel.seed_everything(0, ctx)",
        "faccel.seed_everything('0', ctx)",
    ),
    Mistake(
        "faccel.tracking.finish(faccel.tracking.init_trackers('run', ctx, trackers=('json',)))",
        CONFIG,
        "trackers",
        "json",
        "jsonl",
        "('json',)",
        fixed="faccel.tracking.finish("
        "faccel.tracking.init_trackers('run', ctx, trackers=('jsonl',)))",
    ),
    Mistake(
        "faccel.testing.simulate(lambda ctx: 0, 0)",
        CONFIG,
        "world_size",
        "0",
        "world_size=1",
        fixed="faccel.testing.simulate(lambda ctx: 0, world_size=1)",
    ),
    Mistake(
        "faccel.testing.Fault(rank=0, collective=0, kind='crash')",
        CONFIG,
        "kind",
        "crash",
        "raise",
        "crash",
    ),
    Mistake(
        "func.init_state(net, opt, ctx, seed=0)",
        OPTIMIZER,
        "optimizer",
        "SGD",
        "func.adamw(1e-3)",
        "opt",
    ),
    Mistake("func.adamw(-1.0)", CONFIG, "lr", "-1.0", "adamw(1e-3)", "adamw(-1.0)"),
    Mistake(
        "faccel.Accelerator()",
        AttributeError,
        "Accelerator",
        "",
        "ctx = faccel.init()",
        "faccel.Accelerator()",
    ),
]


def scene(tmp_path):
    """Return the names that the code of the mistakes uses."""
    x, y = torch.randn(8, 4), torch.randint(2, (8,))
    dataset = TensorDataset(x, y)
    loader = DataLoader(dataset, 4, shuffle=True)
    ctx = faccel.init(device="cpu", env={})
    model = faccel.wrap(torch.nn.Linear(4, 2), ctx)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    return {
        "F": F,
        "DataLoader": DataLoader,
        "ctx": ctx,
        "dataset": dataset,
        "epoch": 0,
        "faccel": faccel,
        "func": faccel.func,
        "loader": loader,
        "loss": F.cross_entropy(model(x), y),
        "model": model,
        "net": torch.nn.Linear(4, 2),
        "opt": faccel.wrap_optimizer(opt, model, ctx),
        "path": str(tmp_path / "runs"),
        "scaler": faccel.init_scaler(ctx),
        "state": {"model": model, "step": 0},
        "step": 1,
        "torch": torch,
        "trackers": faccel.tracking.Trackers(),
        "train": faccel.shard(loader, ctx),
        "x": x,
        "y": y,
    }


def message_parts(error):
    """Return the problem, the value and the fix of an error."""
    if isinstance(error, errors.FaccelError):
        return error.problem, error.got, error.fix
    problem, _, fix = str(error).partition("\nTo fix: ")
    return problem, "", fix


def unquoted(code):
    match = re.fullmatch(r"'(.*)'|\"(.*)\"", code)
    return (match[1] or match[2]) if match else code


def check_message(mistake, error):
    problem, got, fix = message_parts(error)
    assert f"`{mistake.argument}`" in problem, "the problem names the argument"
    assert mistake.got in got, "the message repeats the value"
    suggestions = [unquoted(code) for code in re.findall(r"`([^`]+)`", fix)]
    assert mistake.fix in suggestions, "the message suggests the fix"
    assert re.match(r"[a-z]", fix), "a fix starts with a verb"


def test_there_are_at_least_twenty_mistakes():
    assert len(MISTAKES) >= 20


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.code.splitlines()[-1])
def test_the_error_names_argument_value_and_fix(mistake, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(mistake.error) as caught:
        exec(mistake.code, scene(tmp_path))
    check_message(mistake, caught.value)


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.code.splitlines()[-1])
def test_the_fix_works(mistake, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(mistake.fixed_code(), scene(tmp_path))


NAMESPACES = ("", ".backends", ".checkpoint", ".comm", ".func", ".parallel", ".random", ".testing")


def functions_of_a_context():
    """Return the public functions that take a context, by their full name."""
    functions = {}
    for namespace in (*NAMESPACES, ".tracking"):
        module = importlib.import_module(f"faccel{namespace}")
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isfunction(value) and "ctx" in inspect.signature(value).parameters:
                functions.setdefault(value, f"faccel{namespace}.{name}")
    return {name: function for function, name in functions.items()}


FUNCTIONS = functions_of_a_context()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_context_at_the_wrong_place_is_an_error_with_the_order(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ctx = fake_context(0, 1)
    parameters = inspect.signature(FUNCTIONS[name]).parameters.values()
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    required = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    keywords = dict.fromkeys(required, 1)
    arguments = [torch.ones(2) for _ in positional]
    if "ctx" in keywords:
        keywords["ctx"] = torch.ones(2)
    elif len(positional) > 1:  # at the other end
        arguments[0 if positional[-1] == "ctx" else -1] = ctx
    with pytest.raises(errors.FaccelError) as caught:
        result = FUNCTIONS[name](*arguments, **keywords)
        if hasattr(result, "__enter__"):
            result.__enter__()
    assert re.search(rf"{re.escape(name)}\([^`]*ctx", caught.value.fix), caught.value
