"""The checks of `faccel test`, which run on every rank: do these processes compute correctly?"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack

import attrs
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
from faccel.parallel.full_params import full_state_dict
from faccel.plan import PipelineConfig, Plan
from faccel.random.seeding import generator
from faccel.runtime.initialize import init
from faccel.runtime.private_folder import private_folder
from faccel.testing.simulation import fake_context
from faccel.tracking.console import print as print_on_main
from faccel.training.forward_backward import forward_backward
from faccel.training.model import wrap
from faccel.training.optimizer_binding import wrap_optimizer
from faccel.training.precision import init_scaler
from faccel.training.step import optimizer_step
from faccel.training.windows import MicroBatch, windows

# Divisible by most world sizes, so that each rank gets equally many samples of a global batch.
_GLOBAL_BATCH = 48
# For each mesh: its options for other meshes are ignored.
_PLAN = Plan(
    tensor={"0": "colwise", "2": "rowwise"},
    pipeline=PipelineConfig(chain=tuple(str(i) for i in range(7)), schedule="gpipe"),
)
_NUM_SAMPLES = 1009  # a prime number: the last global batch is incomplete on every world size


class CheckFailedError(AssertionError):
    """A check computed a wrong result."""


@attrs.frozen
class CheckResult:
    """The outcome of a check on one rank.

    Args:
        is_passed: Whether it passed on every rank.
        message: What was checked, or what is wrong.
        failed_rank: The first rank on which it failed; None if it passed.
    """

    is_passed: bool
    message: str
    failed_rank: int | None


def _check_collectives(ctx: DistContext) -> str:
    size, rank = ctx.world_size, ctx.rank
    x = {"a": torch.full((2,), float(rank)), "b": torch.tensor([rank])}
    # All collectives before the first comparison: a rank that stopped would block the others.
    gathered = gather(x, ctx, axis="world")["b"].tolist()
    reduced = reduce(x, ctx, axis="world")["a"].tolist()
    received = broadcast(x, ctx, src=size - 1)["b"].item()
    exchanged = all_to_all(10 * rank + torch.arange(size), ctx).tolist()
    is_correct = {
        "gather": gathered == list(range(size)),
        "reduce": reduced == [size * (size - 1) / 2] * 2,
        "broadcast": received == size - 1,
        "all_to_all": exchanged == [10 * source + rank for source in range(size)],
    }
    wrong = [name for name in is_correct if not is_correct[name]]
    if wrong:
        raise CheckFailedError(f"wrong result of {', '.join(wrong)} on rank {rank}")
    return ", ".join(is_correct)


def _check_data_order(ctx: DistContext) -> str:
    # Small batches, so that the shuffled order spans many global batches.
    loader = shard(DataLoader(range(_NUM_SAMPLES), 7, shuffle=True), ctx)  # type: ignore[arg-type]
    samples: list[int] = []
    for batch in batches(loader.at(1)):
        samples += gather(batch.data, ctx, num_valid=batch.num_valid).tolist()
    if sorted(samples) != list(range(_NUM_SAMPLES)):
        raise CheckFailedError("a sample is missing or repeated")
    return f"{_NUM_SAMPLES} samples, each once"


def _check_training(ctx: DistContext) -> str:
    if _GLOBAL_BATCH % ctx.data_world_size:
        return f"skipped: {_GLOBAL_BATCH} is not divisible by {ctx.data_world_size} ranks"
    if ctx.mesh.spec.ep > 1:
        return "skipped: a mesh with `ep` trains models with experts only"
    # Only fields that change the arithmetic; the device stays that of the comparison.
    config = {name: getattr(ctx.config, name) for name in ("mixed_precision", "seed", "grad_accum")}
    expected = _train(fake_context(0, 1, config=config))
    # A plan of the configuration is for the user's model.
    planless = attrs.evolve(ctx, config=attrs.evolve(ctx.config, plan=None))
    difference = (_train(planless) - expected).abs().max().item()
    # In low precision the order of summation changes more digits.
    tolerance = 0.05
    if config["mixed_precision"] == "no":
        tolerance = 1e-4
    if not difference < tolerance:  # also a NaN
        raise CheckFailedError(f"differs from one process by {difference:.1e}")
    return f"differs from one process by {difference:.0e}"


def _train(ctx: DistContext) -> torch.Tensor:
    """Train a small model; return its parameters as `float32[n]`."""
    rng = generator(0)
    inputs = torch.randn(2 * _GLOBAL_BATCH, 8, generator=rng)
    dataset = TensorDataset(inputs, inputs.sum(1, keepdim=True))
    layers: list[torch.nn.Module] = []
    for width in (8, 16, 16):
        layers += [torch.nn.Linear(width, 16), torch.nn.Tanh()]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(16, 1))
    # Not the default initialization, which draws from the process-wide generator.
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randn(param.shape, generator=rng) / 4)
    wrapped = wrap(model, ctx, plan=_PLAN)
    opt = wrap_optimizer(torch.optim.SGD(wrapped.parameters(), lr=0.05), wrapped, ctx)
    scaler = init_scaler(ctx)
    batch_size = _GLOBAL_BATCH // ctx.data_world_size
    loader = shard(DataLoader(dataset, batch_size, shuffle=True), ctx, tail="drop")
    for _, epoch in loader.epochs(5):
        for window in windows(epoch, ctx):
            _, scaler = forward_backward(_loss, wrapped, window, scaler, ctx)
            _, scaler = optimizer_step(opt, scaler, ctx)
    params = full_state_dict(wrapped, ctx, rank=None)
    return torch.cat([params[name].flatten().float().cpu() for name in sorted(params)])


def _loss(model: Callable[..., torch.Tensor], batch: MicroBatch) -> torch.Tensor:
    x, y = batch.data
    return (model(x) - y).square().mean()


def _check_checkpoint(ctx: DistContext) -> str:
    # Rank 0 chooses the name, the others receive it.
    folders: list[str] = []
    with ExitStack() as stack:
        if ctx.is_main:
            folders.append(stack.enter_context(private_folder("faccel-test-")))
        folder = broadcast_objects(folders, ctx)[0]
        # /tmp usually differs between nodes.
        if agree(ctx, missing=not os.path.isdir(folder)).missing:
            parent = os.path.dirname(folder)
            return f"skipped: {parent} is not on all nodes; set TMPDIR to a common folder"
        return _save_and_load(os.path.join(folder, "checkpoints"), ctx)


def _save_and_load(folder: str, ctx: DistContext) -> str:
    x = torch.randn(1000, generator=generator(1))
    save({"x": x, "n": 3}, folder, ctx, step=1)
    problem = ""
    try:
        loaded = load({"x": None, "n": None}, folder, ctx)
        if not torch.equal(loaded["x"], x) or loaded["n"] != 3:
            problem = "the loaded values differ from the saved ones"
    except FaccelError as error:
        problem = str(error)
    # All ranks leave together: rank 0 deletes the folder, which another rank may still read.
    agreed = agree(ctx, failed=bool(problem))
    if problem:
        raise CheckFailedError(problem)
    if agreed.failed:
        raise CheckFailedError(f"rank {agreed.raised_by['failed']} could not load the checkpoint")
    return "saved and loaded, every byte verified"


def _check_bandwidth(ctx: DistContext) -> str:
    x = torch.ones(1 << 22, device=ctx.device)
    reduce(x, ctx, axis="world")  # the first call connects the ranks
    barrier(ctx)
    # After a barrier, so that all ranks start together.
    start = time.perf_counter()
    for _ in range(3):
        reduce(x, ctx, axis="world")
    barrier(ctx)
    seconds = (time.perf_counter() - start) / 3
    return f"reduce of {x.nbytes / 1e6:.0f} MB in {seconds * 1e3:.0f} ms"


CHECKS: Mapping[str, Callable[[DistContext], str]] = {
    "collectives": _check_collectives,
    "data order": _check_data_order,
    "training": _check_training,
    "checkpoint": _check_checkpoint,
    "bandwidth": _check_bandwidth,
}


def run(ctx: DistContext, *, as_json: bool = False) -> int:
    """Run every check, and print a line for each on rank 0.

    Effects: collective.

    Returns:
        The number of checks that failed on any rank.
    """
    results: dict[str, CheckResult] = {}
    for name, check in CHECKS.items():
        results[name] = _run_check(check, ctx)
        if not as_json:
            print_on_main(_line(name, results[name]), ctx=ctx)
    num_failed = sum(not result.is_passed for result in results.values())
    world = f"{ctx.world_size} ranks on {ctx.device.type}"
    if as_json:
        print_on_main(_to_json(results, num_failed, world), ctx=ctx)
        return num_failed
    summary = "all checks passed"
    if num_failed:
        summary = f"{num_failed} of {len(CHECKS)} checks FAILED"
    print_on_main(f"{summary} on {world}", ctx=ctx)
    return num_failed


def _run_check(check: Callable[[DistContext], str], ctx: DistContext) -> CheckResult:
    is_failed = False
    try:
        message = check(ctx)
    except (CheckFailedError, FaccelError, RuntimeError) as error:
        is_failed = True
        message = f"{type(error).__name__}: {error}"
    # A check that fails on one rank counts as failed on all, so all return one number.
    agreed = agree(ctx, failed=is_failed)
    failed_rank = agreed.raised_by["failed"]
    if agreed.failed and not is_failed:
        message = f"passed on rank {ctx.rank}, failed on another"
    return CheckResult(not agreed.failed, message, failed_rank)


def _line(name: str, result: CheckResult) -> str:
    if result.is_passed:
        return f"{name:<12} {'ok':<7} {result.message}"
    return f"{name:<12} {'FAILED':<7} {result.message} (first on rank {result.failed_rank})"


def _to_json(results: Mapping[str, CheckResult], num_failed: int, world: str) -> str:
    checks: dict[str, dict[str, object]] = {}
    for name, result in results.items():
        checks[name] = {
            "passed": result.is_passed,
            "message": result.message,
            "rank": result.failed_rank,
        }
    return json.dumps({"checks": checks, "failed": num_failed, "where": world})


if __name__ == "__main__":
    # TPUs round matrices of fp32 to bf16 by default, and would differ from the CPU.
    torch.set_float32_matmul_precision("highest")
    with init() as context:
        num_failed = run(context, as_json="--json" in sys.argv)
    sys.exit(min(num_failed, 1))
