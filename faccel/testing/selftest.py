"""What `faccel test` runs on every rank: does this machine, with these options, compute what it should?"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable

import torch
from torch.utils.data import DataLoader, TensorDataset

from faccel.checkpoint.load import load
from faccel.checkpoint.save import save
from faccel.comm.control import agree, barrier
from faccel.comm.objects import broadcast_objects
from faccel.comm.shapes import all_to_all
from faccel.comm.tensors import broadcast, gather, reduce
from faccel.context import DistContext
from faccel.data.loader import batches, shard
from faccel.errors import FaccelError
from faccel.random.seeding import generator
from faccel.runtime.initialize import init
from faccel.testing.simulation import fake_context
from faccel.tracking.console import print as print_once
from faccel.training.model import wrap, wrap_optimizer
from faccel.training.precision import init_scaler
from faccel.training.step import optimizer_step, scaled_backward


class CheckFailedError(AssertionError):
    """A check did not find what it should."""


def _expect(fine: bool, what: str) -> None:  # noqa: FBT001
    if not fine:
        raise CheckFailedError(what)


def _collectives(ctx: DistContext) -> str:
    n, r = ctx.world_size, ctx.rank
    x = {"a": torch.full((2,), float(r)), "b": torch.tensor([r])}
    found = {  # all of them first: a rank that stopped at the first wrong one would leave the others waiting
        "gather": gather(x, ctx, axis="world")["b"].tolist() == list(range(n)),
        "reduce": reduce(x, ctx, axis="world")["a"].tolist() == [n * (n - 1) / 2] * 2,
        "broadcast": broadcast(x, ctx, src=n - 1)["b"].item() == n - 1,
        "all_to_all": all_to_all(10 * r + torch.arange(n), ctx).tolist()
        == [10 * i + r for i in range(n)],
    }
    wrong = [name for name, fine in found.items() if not fine]
    _expect(not wrong, f"{', '.join(wrong)} of rank {r}")
    return ", ".join(found)


def _data_order(ctx: DistContext) -> str:
    loader = shard(DataLoader(range(1009), 7, shuffle=True), ctx)  # type: ignore[arg-type]
    seen = [gather(batch.data, ctx, num_valid=batch.num_valid) for batch in batches(loader.at(1))]
    _expect(sorted(torch.cat(seen).tolist()) == list(range(1009)), "each sample once")
    return "1009 samples, each once"


def _train(ctx: DistContext) -> torch.Tensor:
    rng = generator(0)
    inputs = torch.randn(96, 8, generator=rng)
    data = TensorDataset(inputs, inputs.sum(1, keepdim=True))
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=rng) / 4)
    wrapped = wrap(model, ctx)
    opt = wrap_optimizer(torch.optim.SGD(wrapped.parameters(), lr=0.05), wrapped, ctx)
    scaler = init_scaler(ctx)
    loader = shard(DataLoader(data, 48 // ctx.data_world_size, shuffle=True), ctx, tail="drop")
    for _, part in loader.epochs(5):
        for x, y in part:
            scaler = scaled_backward((wrapped(x) - y).square().mean(), scaler, ctx)
            _, scaler = optimizer_step(opt, scaler, ctx)
    return torch.cat([p.detach().flatten().float().cpu() for p in model.parameters()])


def _training(ctx: DistContext) -> str:
    if 48 % ctx.data_world_size:
        return f"not compared: 48 samples cannot be shared by {ctx.data_world_size} ranks"
    config = {name: getattr(ctx.config, name) for name in ("mixed_precision", "seed", "grad_accum")}
    difference = (_train(ctx) - _train(fake_context(0, 1, config=config))).abs().max().item()
    limit = 1e-4 if config["mixed_precision"] == "no" else 0.05
    _expect(difference < limit, f"differs from one process by {difference:.1e}")
    return f"differs from one process by {difference:.0e}"


def _checkpoint(ctx: DistContext) -> str:
    folder = broadcast_objects(
        [tempfile.mkdtemp(prefix="faccel-test-")] if ctx.is_main else [], ctx
    )[0]
    try:
        if agree(ctx, missing=not os.path.isdir(folder)).missing:
            return f"not checked: the machines do not share {os.path.dirname(folder)}; set TMPDIR to a folder they do"
        return _round_trip(folder, ctx)
    finally:
        if ctx.is_main:
            shutil.rmtree(folder, ignore_errors=True)


def _round_trip(folder: str, ctx: DistContext) -> str:
    x = torch.randn(1000, generator=generator(1))
    save({"x": x, "n": 3}, folder, ctx, step=1)
    problem = ""
    try:
        back = load({"x": None, "n": None}, folder, ctx)
        problem = "" if torch.equal(back["x"], x) and back["n"] == 3 else "not what was saved"
    except FaccelError as error:
        problem = str(error)
    told = agree(ctx, failed=bool(problem))  # nobody deletes it while another one reads
    _expect(not told.failed, problem or f"rank {told.raised_by['failed']} could not load it")
    return "saved and loaded, every byte verified"


def _bandwidth(ctx: DistContext) -> str:
    x = torch.ones(1 << 22, device=ctx.device)
    reduce(x, ctx, axis="world")
    barrier(ctx)
    began = time.perf_counter()
    for _ in range(3):
        reduce(x, ctx, axis="world")
    barrier(ctx)
    seconds = (time.perf_counter() - began) / 3
    return f"reduce of {x.nbytes / 1e6:.0f} MB in {seconds * 1e3:.0f} ms"


CHECKS: dict[str, Callable[[DistContext], str]] = {
    "collectives": _collectives,
    "data order": _data_order,
    "training": _training,
    "checkpoint": _checkpoint,
    "bandwidth": _bandwidth,
}


def run(ctx: DistContext, *, as_json: bool = False) -> int:
    """Run every check and print a line for each on rank 0; return how many failed on any rank."""
    results: dict[str, dict[str, object]] = {}
    for name, check in CHECKS.items():
        try:
            said, fine = check(ctx), True
        except (CheckFailedError, FaccelError, RuntimeError) as error:
            said, fine = f"{type(error).__name__}: {error}", False
        told = agree(ctx, failed=not fine)
        by = told.raised_by["failed"]
        results[name] = {"passed": not told.failed, "said": said, "rank": by}
        where = "" if fine or not told.failed else f" (rank {by})"
        if not as_json:
            print_once(f"{name:<12} {'FAILED' if told.failed else 'ok':<7} {said}{where}", ctx=ctx)
    failed = sum(not each["passed"] for each in results.values())
    where = f"{ctx.world_size} ranks on {ctx.device.type}"
    if as_json:
        print_once(json.dumps({"checks": results, "failed": failed, "where": where}), ctx=ctx)
    else:
        verdict = f"{failed} of {len(CHECKS)} checks FAILED" if failed else "all checks passed"
        print_once(f"{verdict} on {where}", ctx=ctx)
    return failed


if __name__ == "__main__":
    with init() as context:
        sys.exit(1 if run(context, as_json="--json" in sys.argv) else 0)
