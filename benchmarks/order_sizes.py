"""Time to the first shuffled batch at the middle of an epoch, for 10**3 to 10**9 samples.

faccel and Accelerate resume at the middle of an epoch; PyTorch, which cannot, starts at the
beginning. CPU time is counted, so that other processes of the node do not matter. PyTorch and
Accelerate store the whole order: they run up to 10**7 samples.

python benchmarks/order_sizes.py
"""

import itertools
import time

import torch
from accelerate import Accelerator
from measure import alternate, report, spread, target
from order import BATCH_SIZE, Arithmetic
from torch.utils.data import DataLoader

import faccel
from faccel.testing import fake_context

SIZES = [10**exponent for exponent in range(3, 10)]
LARGEST_OF_PEERS = 10**7
ROUNDS = 5

epochs = itertools.count()


def loader_of(size):
    return DataLoader(Arithmetic(size), BATCH_SIZE, shuffle=True)


def first_of_faccel(size):
    loader = faccel.shard(loader_of(size), fake_context(0, 1))
    return next(iter(loader.resume(faccel.Cursor(next(epochs), size // 2))))


def first_of_accelerate(size, accelerator):
    loader = accelerator.prepare(loader_of(size))
    skipped = accelerator.skip_first_batches(loader, size // 2 // BATCH_SIZE)
    return next(iter(skipped))


def first_of_torch(size):
    return next(iter(loader_of(size)))


def contenders(size, accelerator):
    result = {"faccel": lambda: first_of_faccel(size)}
    if size <= LARGEST_OF_PEERS:
        result["torch"] = lambda: first_of_torch(size)
        result["accelerate"] = lambda: first_of_accelerate(size, accelerator)
    return result


if __name__ == "__main__":
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    results = {}
    for size in SIZES:
        runs = contenders(size, accelerator)
        seconds = alternate(runs, ROUNDS, warmup=1, clock=time.process_time)
        for name in runs:
            row = spread([1e3 * value for value in seconds[name]])
            results.setdefault(name, {})[str(size)] = {"ms": row}
            print(f"{size:>12,}  {name:<12}{row['median']:>10.2f} ms")
    slowest = max(row["ms"]["median"] for row in results["faccel"].values())
    report(
        "order_sizes",
        {"batch_size": BATCH_SIZE, "rounds": ROUNDS, "clock": "CPU time", "threads": 1},
        results,
        [target("faccel, ms of CPU time to the first batch of any size", slowest, at_most=50)],
    )
