"""Measure a functional step against a plain PyTorch loop, on one process.

Both run forward, backward and AdamW on the same model and batch: the digits model, then eight small
models. The plain loop is `loss.backward(); opt.step(); opt.zero_grad()`.

    python benchmarks/functional.py
"""

import importlib.util
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from measure import alternate, ratios, report, spread, table, target
from torch import nn

import faccel
from faccel import func

ROUNDS = 60
STEPS = 20  # of each contender in a round
MODELS = 8
BATCH = 64
SEED = 0


def digits():
    """Return the example as a module that `torch.compile` can import by name."""
    path = Path(__file__).parents[1] / "examples" / "digits.py"
    spec = importlib.util.spec_from_file_location("digits", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["digits"] = module
    spec.loader.exec_module(module)
    return module


def plain(models, batch):
    x, y = batch
    pairs = [(model, torch.optim.AdamW(model.parameters(), lr=1e-3)) for model in models]

    def run():
        for _ in range(STEPS):
            for model, opt in pairs:
                F.cross_entropy(model(x), y).backward()
                opt.step()
                opt.zero_grad()

    return run


def functional(step, state, batch):
    current = [state]

    def run():
        for _ in range(STEPS):
            _, current[0] = step(current[0], batch)

    return run


def loss_of(model):
    def loss_fn(params, batch, generator):
        return F.cross_entropy(func.functional_call(model, params, batch[0]), batch[1])

    return loss_fn


def small(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def main(ctx):
    example = digits()
    x, y = example.datasets()[0].tensors
    batch = (x[:BATCH], y[:BATCH])
    results, targets = {}, []

    torch.manual_seed(SEED)
    net, optimizer = example.Net(), func.adamw(1e-3)
    fresh = lambda: func.init_state(net, optimizer, ctx, seed=SEED)  # noqa: E731
    step = func.make_step(loss_of(net), optimizer, ctx)
    donating = func.make_step(loss_of(net), optimizer, ctx, donate=True)
    one = alternate(
        {
            "torch": plain([net], batch),
            "pure": functional(step, fresh(), batch),
            "donated": functional(donating, fresh(), batch),
            "compiled": functional(torch.compile(donating, fullgraph=True), fresh(), batch),
        },
        ROUNDS,
    )
    results["digits"] = table("one step of the digits model", one, "torch", calls=STEPS)
    for name, limit in (("pure", 1.15), ("donated", 1.15), ("compiled", 1.0)):
        measured = spread(ratios(one, name, "torch"))["median"]
        targets.append(
            target(f"{name} step of the digits model / plain torch", measured, at_most=limit)
        )

    models = [small(SEED + i) for i in range(MODELS)]
    states = func.stack(
        [func.init_state(model, optimizer, ctx, seed=i) for i, model in enumerate(models)]
    )
    together = func.ensemble(func.make_step(loss_of(models[0]), optimizer, ctx), ctx)
    many = alternate(
        {
            "8 loops of torch": plain(models, batch),
            "ensemble": functional(together, states, batch),
            "compiled ensemble": functional(torch.compile(together, fullgraph=True), states, batch),
        },
        ROUNDS,
    )
    results["ensemble"] = table(
        "one step of eight small models", many, "8 loops of torch", calls=STEPS
    )
    measured = 1 / spread(ratios(many, "compiled ensemble", "8 loops of torch"))["median"]
    targets.append(target("8 loops of torch / compiled ensemble", measured, at_least=3.0))

    settings = {
        "rounds": ROUNDS,
        "steps": STEPS,
        "models": MODELS,
        "batch": BATCH,
        "threads": torch.get_num_threads(),
    }
    report("functional", settings, results, targets)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with faccel.init(device="cpu") as ctx:
        main(ctx)
