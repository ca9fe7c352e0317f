"""Saving and loading 400 MB: faccel, a raw write, PyTorch's DCP and Accelerate.

All contenders use the same state, disk and process, and alternate. Targets: a durable save takes
at most 1.3 times as long as a raw write with fsync. A background save blocks the loop
at most 1.2 times as long as a copy of the state in memory. A load that verifies everything takes at
most 1.3 times as long as DCP's. Accelerate's save is not durable.

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
    """Return the peak of the anonymous memory of a call in MB; memory-mapped files do not count."""
    before = anonymous_kb()
    peak, is_done = [0], threading.Event()

    def watch():
        while not is_done.wait(0.0005):
            peak[0] = max(peak[0], anonymous_kb())

    watcher = threading.Thread(target=watch)
    watcher.start()
    run()
    is_done.set()
    watcher.join()
    return max(0, peak[0] - before) / 1e3


def anonymous_kb():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


def main(ctx, folder):
    net = Net()
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(net)
    steps = itertools.count(1)

    def clean():
        faccel.latest(folder / "faccel", ctx)  # waits for a background save
        for name in ("raw", "dcp", "accelerate", "faccel"):
            shutil.rmtree(folder / name, ignore_errors=True)
        (folder / "raw").mkdir()
        os.sync()

    saves = {
        "raw write and fsync": lambda: raw_write(net, folder / "raw" / "file"),
        "faccel.save": lambda: faccel.save({"net": net}, folder / "faccel", ctx, step=next(steps)),
        "dcp.save": lambda: dcp.save({"net": net.state_dict()}, checkpoint_id=folder / "dcp"),
        "accelerate save_state": lambda: accelerator.save_state(folder / "accelerate"),
    }
    saved = alternate(saves, ROUNDS, warmup=1, before=clean)
    results = {"durable save": table("save, 400 MB", saved, "raw write and fsync", unit="ms")}

    copies = []
    blocking = {
        "copy in memory": lambda: copies.append([p.detach().clone() for p in net.parameters()]),
        "faccel.save(background=True)": lambda: faccel.save(
            {"net": net}, folder / "faccel", ctx, step=next(steps), background=True
        ),
    }

    def clean_all():
        copies.clear()
        clean()

    blocked = alternate(blocking, ROUNDS, warmup=1, before=clean_all)
    results["time that the loop is blocked"] = table(
        "background save, 400 MB", blocked, "copy in memory", unit="ms"
    )

    clean()
    for save in saves.values():
        save()
    state = {"net": net}
    loads = {
        "dcp.load": lambda: dcp.load({"net": net.state_dict()}, checkpoint_id=folder / "dcp"),
        "faccel.load": lambda: faccel.load(state, folder / "faccel", ctx),
        "accelerate load_state": lambda: accelerator.load_state(folder / "accelerate"),
    }
    loaded = alternate(loads, ROUNDS, warmup=1)
    results["load"] = table("load, 400 MB, in the page cache", loaded, "dcp.load", unit="ms")

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
            "loop blocked / copy",
            median(blocked, "faccel.save(background=True)", "copy in memory"),
            at_most=1.2,
        ),
        target("verified load / dcp", median(loaded, "faccel.load", "dcp.load"), at_most=1.3),
    ]
    report("checkpoint", {"bytes": NUM_TENSORS * SIZE * 4, "rounds": ROUNDS}, results, targets)


if __name__ == "__main__":
    work = Path(tempfile.mkdtemp(dir=os.environ.get("BENCHMARK_DIR")))
    try:
        with faccel.init() as context:
            main(context, work)
    finally:
        shutil.rmtree(work)
