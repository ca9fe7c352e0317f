"""Saving and loading 400 MB of parameters, durably: beside a raw write, torch's distributed checkpoint and Accelerate.

All on the same state, disk and process, in turns. What is asked for: a durable save at most 1.3 times a raw write with
fsync of the same bytes; a background save that holds the loop at most 1.2 times a copy of the state in memory; a load
that verifies everything at most 1.3 times that of torch's distributed checkpoint. (Accelerate's save is not durable.)

python benchmarks/checkpoint.py
"""

import itertools
import logging
import os
import shutil
import tempfile
import threading
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from measure import alternate, ratios, report, spread, table, target
from torch import nn

import faccel

NUM_TENSORS, SIZE = 25, 4_000_000  # of float32: 400 MB
ROUNDS = 9

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nn.ParameterList(torch.randn(SIZE) for _ in range(NUM_TENSORS))


def raw_write(net, path):
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    for p in net.parameters():
        data = memoryview(p.detach().numpy()).cast("B")
        for start in range(0, len(data), 1 << 22):
            os.write(fd, data[start : start + (1 << 22)])
    os.fsync(fd)
    os.close(fd)


def memory_of(run):
    """Return by how many MB a call raises the anonymous memory at its peak; pages that it maps of files are free."""
    before, peak, ended = anonymous(), [0], threading.Event()

    def watch():
        while not ended.wait(0.0005):
            peak[0] = max(peak[0], anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    run()
    ended.set()
    watcher.join()
    return max(0, peak[0] - before) / 1e3


def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


def main(ctx, folder):
    net = Net()
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(net)
    steps = itertools.count(1)

    def clean():
        faccel.latest(folder / "faccel", ctx)  # waits for what is being written
        for name in ("raw", "dcp", "accelerate", "faccel"):
            shutil.rmtree(folder / name, ignore_errors=True)
        (folder / "raw").mkdir()
        os.sync()

    saves = {
        "raw write and fsync": lambda: raw_write(net, folder / "raw" / "file"),
        "faccel.save": lambda: faccel.save({"net": net}, folder / "faccel", ctx, step=next(steps)),
        "torch's dcp.save": lambda: dcp.save(
            {"net": net.state_dict()}, checkpoint_id=folder / "dcp"
        ),
        "accelerate save_state": lambda: accelerator.save_state(folder / "accelerate"),
    }
    saved = alternate(saves, ROUNDS, warmup=1, before=clean)
    results = {"durable save": table("save, 400 MB", saved, "raw write and fsync", unit="ms")}

    copies = []
    held = {
        "copy in memory": lambda: copies.append([p.detach().clone() for p in net.parameters()]),
        "faccel.save(background=True)": lambda: faccel.save(
            {"net": net}, folder / "faccel", ctx, step=next(steps), background=True
        ),
    }

    def settle():
        copies.clear()
        clean()

    hold = alternate(held, ROUNDS, warmup=1, before=settle)
    results["time that the loop is held"] = table(
        "background save, 400 MB", hold, "copy in memory", unit="ms"
    )

    clean()
    for save in saves.values():
        save()
    state = {"net": net}
    loads = {
        "torch's dcp.load": lambda: dcp.load(
            {"net": net.state_dict()}, checkpoint_id=folder / "dcp"
        ),
        "faccel.load": lambda: faccel.load(state, folder / "faccel", ctx),
        "accelerate load_state": lambda: accelerator.load_state(folder / "accelerate"),
    }
    loaded = alternate(loads, ROUNDS, warmup=1)
    results["load"] = table(
        "load, 400 MB, in the page cache", loaded, "torch's dcp.load", unit="ms"
    )

    memory = {name: memory_of(run) for name, run in loads.items()}
    for name, run in saves.items():
        clean()
        memory[name] = memory_of(run)
    print("\npeak memory above the model's own, MB")
    for name, amount in memory.items():
        print(f"  {name:<28}{amount:>10.1f}")
    results["peak extra memory, MB"] = memory

    def median(seconds, name, baseline):
        return spread(ratios(seconds, name, baseline))["median"]

    targets = [
        target(
            "durable save / raw write",
            median(saved, "faccel.save", "raw write and fsync"),
            at_most=1.3,
        ),
        target(
            "loop held / copy",
            median(hold, "faccel.save(background=True)", "copy in memory"),
            at_most=1.2,
        ),
        target(
            "verified load / dcp", median(loaded, "faccel.load", "torch's dcp.load"), at_most=1.3
        ),
    ]
    report("checkpoint", {"bytes": NUM_TENSORS * SIZE * 4, "rounds": ROUNDS}, results, targets)


if __name__ == "__main__":
    work = Path(tempfile.mkdtemp(dir=os.environ.get("BENCHMARK_DIR")))
    try:
        with faccel.init() as context:
            main(context, work)
    finally:
        shutil.rmtree(work)
