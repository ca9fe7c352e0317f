"""The worker of `benchmarks/gpu.py`: runs the measurements that its arguments name, in order.

Each measurement writes its rows as soon as it has them, and one that raises fails alone.
"""

import argparse
import contextlib
import dataclasses
import functools
import gc
import importlib.util
import platform
import traceback
import warnings
from importlib import metadata

import torch
from gpu_contenders import (
    SHARDED,
    Setup,
    accelerate_step,
    checkpointed_by_torch,
    context,
    faccel_step,
    fp8_by_torchao,
    sharded_by_torch,
    synchronize,
    torch_step,
)
from gpu_input_output import seconds_of_loading, seconds_of_saves
from gpu_lines import short, write
from gpu_model import SIZES, Block, token_batches
from gpu_table import MEASUREMENTS
from measure import alternate, hardware, ratios, spread
from torch import nn
from torch.utils.data import DataLoader

import faccel
from tests.gpu.counting import peak_bytes, synchronisations

PACKAGES = ("torch", "numpy", "attrs", "tensordict", "accelerate", "transformers", "torchao")
COUNTED_STEPS = 5


class UnavailableError(Exception):
    """A row cannot be measured on this device, or with these packages."""


def rows_of_seconds(name, seconds, value_of):
    """Write the rows of a measurement: the median of each contender, and its ratio to the first."""
    for row, contender in zip(MEASUREMENTS[name], seconds, strict=False):
        values = spread([value_of(x) for x in seconds[contender]])
        ratio = spread(ratios(seconds, contender, next(iter(seconds))))
        write(row={"name": row.name, "value": values["median"], "ratio": ratio["median"],
                   "spread": [ratio["first_quartile"], ratio["third_quartile"]]})  # fmt: skip


def measure_step(name, setup, makers):
    """Alternate rounds of steps of the contenders, and write their rows."""
    rows = dict(zip(makers, MEASUREMENTS[name], strict=True))
    with contextlib.ExitStack() as stack:
        rounds = {}
        for contender, make in makers.items():
            try:
                step = make(setup, stack)
                step()  # compiles, and allocates the states of the optimizer
                write(progress=contender)  # so that the worker does not seem to hang
            except Exception as error:
                if contender != "accelerate":
                    raise
                write(row={"name": rows[contender].name, "skipped": short(error)})
                continue
            rounds[contender] = functools.partial(run_steps, step, setup)
        seconds = alternate(rounds, setup.size.rounds, before=lambda: synchronize(setup.device))
    rows_of_seconds(name, seconds, lambda x: 1e3 * x / setup.size.steps)


def run_steps(step, setup):
    for _ in range(setup.size.steps):
        step()
    synchronize(setup.device)


CONTENDERS = {"torch": torch_step, "faccel": faccel_step, "accelerate": accelerate_step}


def step_in(name, device, size, precision):
    measure_step(name, Setup(device, size, precision), CONTENDERS)


def step_compiled(name, device, size):
    if size is SIZES["quick"]:
        raise UnavailableError("--quick leaves out the compiler")
    makers = {
        "torch": functools.partial(torch_step, change=torch.compile),
        "faccel": faccel_step,
        "accelerate": functools.partial(accelerate_step, change=torch.compile),
    }
    torch._dynamo.reset()
    if device.type == "cpu":  # where each kernel takes seconds to compile
        size = dataclasses.replace(size, depth=1)
    measure_step(name, Setup(device, size, "bf16", faccel.Plan(compile="whole")), makers)


def step_fp8(name, device, size):
    if importlib.util.find_spec("torchao") is None:
        raise UnavailableError("torchao is not installed")
    # A CPU emulates it, and the compiler would take minutes for that.
    emulate = device.type != "cuda"
    fp8 = faccel.parallel.Fp8(emulate=emulate)
    plan = faccel.Plan(compile=None if emulate else "whole", fp8=fp8)
    makers = {
        "torch": functools.partial(
            torch_step, change=functools.partial(fp8_by_torchao, emulate=emulate)
        ),
        "faccel": faccel_step,
    }
    torch._dynamo.reset()
    measure_step(name, Setup(device, size, "fp8", plan), makers)


class SmallModel(nn.Sequential):
    """Layers so small that a GPU waits for the host."""

    def __init__(self):
        super().__init__(nn.Embedding(64, 64), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, tokens):
        return super().forward(tokens % 64).square().mean()


def small_model(size, device="cpu"):
    torch.manual_seed(0)
    return SmallModel().to(device)


def step_small(name, device, size):
    measure_step(name, Setup(device, size, build=small_model), CONTENDERS)


def step_sharded(name, device, size):
    setup = Setup(device, size, "bf16", SHARDED)
    with contextlib.ExitStack() as stack:
        # First: plain PyTorch uses the process group of faccel's world of one.
        sharded = faccel_step(setup, stack, "sharded")
        makers = {
            "torch": functools.partial(
                torch_step, change=functools.partial(sharded_by_torch, setup)
            ),
            "faccel": lambda setup, stack: sharded,
        }
        measure_step(name, setup, makers)


def count_per_step(row, device, step):
    """Write how often the host waits for the device in a step, after two steps."""
    step()
    step()
    synchronize(device)
    with synchronisations(device) as places:
        for _ in range(COUNTED_STEPS):
            step()
    line = {"name": row.name, "value": places.total() / COUNTED_STEPS}
    if places:
        line["note"] = ", ".join(f"{count} at {place}" for place, count in places.most_common(3))
    write(row=line)


def count_in(name, device, size, precision, strategy=None, plan=None):
    setup = Setup(device, size, precision, plan or faccel.Plan())
    with contextlib.ExitStack() as stack:
        count_per_step(MEASUREMENTS[name][0], device, faccel_step(setup, stack, strategy))


def count_in_fp16(name, device, size):
    """Count beside plain PyTorch, whose fused optimizers skip an update on the device."""
    with contextlib.ExitStack() as stack:
        setup = Setup(device, size, "fp16")
        for row, make in zip(MEASUREMENTS[name], (torch_step, faccel_step), strict=True):
            count_per_step(row, device, make(setup, stack))


def count_with_loader(name, device, size):
    """Count in a loop with pinned batches, clipping, a scheduler and both kinds of updates."""
    setup = Setup(device, size, "bf16")
    with contextlib.ExitStack() as stack:
        ctx = context(setup, stack)
        model, opt, scaler = trained(setup, ctx)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=100)
        batches = endless(token_loader(setup, ctx))

        def step():
            nonlocal scaler
            scaler = faccel.scaled_backward(model(next(batches)), scaler, ctx)
            _, scaler = faccel.optimizer_step(
                opt, scaler, ctx, clip_norm=1.0, clip_value=1.0, scheduler=scheduler
            )

        count_per_step(MEASUREMENTS[name][0], device, step)


def count_with_windows(name, device, size):
    setup = Setup(device, size, "bf16")
    with contextlib.ExitStack() as stack:
        ctx = context(setup, stack)
        model, opt, scaler = trained(setup, ctx)
        ema = faccel.parallel.init_ema(model, ctx, decay=0.9)
        loader = token_loader(setup, ctx)
        windows = (
            window
            for epoch in range(1000)
            for window in faccel.windows(loader.at(epoch), ctx, size=4, weight=num_tokens)
        )

        def step():
            nonlocal scaler, ema
            _, scaler = faccel.forward_backward(loss_fn, model, next(windows), scaler, ctx)
            _, scaler = faccel.optimizer_step(opt, scaler, ctx, clip_norm=1.0)
            ema = faccel.parallel.update_ema(ema, model, ctx)

        count_per_step(MEASUREMENTS[name][0], device, step)


def loss_fn(model, batch):
    return model(batch.data)


def num_tokens(batch):
    return batch.data[:, 1:].numel()


def trained(setup, ctx):
    model = faccel.wrap(setup.build(setup.size), ctx)
    opt = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    return model, faccel.wrap_optimizer(opt, model, ctx), faccel.init_scaler(ctx)


def token_loader(setup, ctx):
    batches = torch.cat(token_batches(setup.size, 16))
    is_pinned = setup.device.type != "cpu"
    loader = DataLoader(batches, setup.size.batch_size, shuffle=True, pin_memory=is_pinned)
    return faccel.shard(loader, ctx)


def endless(loader):
    for _, epoch_loader in loader.epochs(10**6):
        yield from epoch_loader


def measure_memory(name, setup, makers):
    """Write the peak of the memory of three steps of each contender."""
    peaks = {}
    for contender, make in makers.items():

        def train(make=make):
            with contextlib.ExitStack() as stack:
                step = make(setup, stack)
                for _ in range(3):
                    step()

        train()  # what is allocated once in a process, such as the workspace of cuBLAS
        peaks[contender] = peak_bytes(setup.device, train)
    for row, contender in zip(MEASUREMENTS[name], peaks, strict=True):
        ratio = peaks[contender] / peaks["torch"]
        write(row={"name": row.name, "value": peaks[contender] / 2**20, "ratio": ratio})


def memory_step(name, device, size):
    makers = {"torch": torch_step, "faccel": faccel_step}
    measure_memory(name, Setup(device, size, "bf16"), makers)


def memory_checkpointed(name, device, size):
    plan = faccel.Plan(units=Block.__name__, activation_checkpoint="full")
    makers = {
        "torch": functools.partial(torch_step, change=checkpointed_by_torch),
        "faccel": faccel_step,
    }
    measure_memory(name, Setup(device, size, "bf16", plan), makers)


def memory_sharded(name, device, size):
    setup = Setup(device, size, "bf16", SHARDED)

    def torch_sharded(setup, stack):
        context(setup, stack, "sharded")  # for its process group
        return torch_step(setup, stack, functools.partial(sharded_by_torch, setup))

    makers = {"torch": torch_sharded, "faccel": functools.partial(faccel_step, strategy="sharded")}
    measure_memory(name, setup, makers)


def save(name, device, size, *, background):
    seconds = seconds_of_saves(device, size, background=background)
    rows_of_seconds(name, seconds, lambda x: 1e3 * x)


def load(name, device, size, *, workers):
    seconds = seconds_of_loading(device, size, size.num_workers if workers else 0)
    rows_of_seconds(name, seconds, lambda x: size.num_items / x)
    if "accelerate" not in seconds:
        row = MEASUREMENTS[name][2]
        write(row={"name": row.name, "skipped": "accelerate is not installed"})


FUNCTIONS = {
    "step bf16": functools.partial(step_in, precision="bf16"),
    "step fp16": functools.partial(step_in, precision="fp16"),
    "step compiled": step_compiled,
    "step fp8": step_fp8,
    "step small": step_small,
    "step sharded": step_sharded,
    "synchronisations fp32": functools.partial(count_in, precision="no"),
    "synchronisations bf16": functools.partial(count_in, precision="bf16"),
    "synchronisations fp16": count_in_fp16,
    "synchronisations loader": count_with_loader,
    "synchronisations windows": count_with_windows,
    "synchronisations sharded": functools.partial(
        count_in, precision="bf16", strategy="sharded", plan=SHARDED
    ),
    "memory step": memory_step,
    "memory checkpointed": memory_checkpointed,
    "memory sharded": memory_sharded,
    "save background": functools.partial(save, background=True),
    "save durable": functools.partial(save, background=False),
    "loading one process": functools.partial(load, workers=False),
    "loading workers": functools.partial(load, workers=True),
}


def about(device):
    """Write the hardware and the versions."""
    versions = {"python": platform.python_version(), "faccel": faccel.__version__}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    record = hardware() | {"device": "CPU"}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        record |= {"device": properties.name, "memory": properties.total_memory}
        versions |= {
            "CUDA": torch.version.cuda,
            "NCCL": ".".join(map(str, torch.cuda.nccl.version())),
        }
    write(hardware=record, versions=versions)


def main():
    """Run the measurements."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", required=True)
    parser.add_argument("--size", required=True, choices=SIZES)
    parser.add_argument("names", nargs="*")
    args = parser.parse_args()
    device = torch.device(args.device)
    warnings.filterwarnings("ignore")
    about(device)
    for name in args.names:
        write(start=name)
        try:
            FUNCTIONS[name](name, device, SIZES[args.size])
        except UnavailableError as reason:
            write(skipped=str(reason))
        except Exception as error:
            traceback.print_exc()
            write(error=short(error))
        write(end=name)
        gc.unfreeze()  # what `alternate` has frozen: the models of this measurement
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
