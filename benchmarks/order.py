"""Time and memory to the first batch of a billion shuffled samples, and one batch's cost.

The loader starts at the beginning of an epoch and at 99 % of it. PyTorch's RandomSampler, which
allocates the full order, runs over 10**7 samples. Then the loader runs as rank 0 of 1 and as rank
255 of 512.

python benchmarks/order.py
"""

import itertools
import resource
import tracemalloc

import torch
from measure import alternate, ratios, report, spread, table, target
from torch.utils.data import DataLoader, Dataset

import faccel
from faccel.testing import fake_context

NUM_SAMPLES = 10**9
NUM_TORCH_SAMPLES = 10**7
BATCH_SIZE = 32
RANK, WORLD_SIZE = 255, 512
NUM_BATCHES = 512  # per round and contender
ROUNDS = 40
MEGABYTE = 1e6


class Arithmetic(Dataset):
    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        return i % 1009


epochs = itertools.count()


def first_batch(share):
    """Read one batch of a new epoch, from a new loader, at `share` of the epoch."""
    loader = faccel.shard(
        DataLoader(Arithmetic(NUM_SAMPLES), BATCH_SIZE, shuffle=True), fake_context(0, 1)
    )
    return next(iter(loader.resume(faccel.Cursor(next(epochs), int(share * NUM_SAMPLES)))))


def first_batch_of_torch():
    return next(iter(DataLoader(Arithmetic(NUM_TORCH_SAMPLES), BATCH_SIZE, shuffle=True)))


def python_peak(run):
    """Return the peak of what python and numpy allocate in `run`, in megabytes."""
    tracemalloc.start()
    run()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / MEGABYTE


def process_growth(run):
    """Return by how much `run` raises the peak memory of the process, in megabytes."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / MEGABYTE


def read_batches(rank, world_size):
    loader = faccel.shard(
        DataLoader(Arithmetic(NUM_SAMPLES), BATCH_SIZE, shuffle=True),
        fake_context(rank, world_size),
    )

    def run():
        for _ in itertools.islice(loader.at(next(epochs)), NUM_BATCHES):
            pass

    return run


def make_rows(rank, world_size):
    loader = faccel.shard(
        DataLoader(Arithmetic(NUM_SAMPLES), BATCH_SIZE, shuffle=True),
        fake_context(rank, world_size),
    )

    def run():
        order = loader.source.order(next(epochs))
        for _ in itertools.islice(loader.source.plan.batches(order, 0), NUM_BATCHES):
            pass

    return run


def compare_worlds(title, make):
    one, many = "rank 0 of 1", f"rank {RANK} of {WORLD_SIZE}"
    seconds = alternate({one: make(0, 1), many: make(RANK, WORLD_SIZE)}, ROUNDS)
    return table(title, seconds, one, calls=NUM_BATCHES), spread(ratios(seconds, many, one))[
        "median"
    ]


if __name__ == "__main__":
    torch.set_num_threads(1)
    start, late = lambda: first_batch(0.0), lambda: first_batch(0.99)
    start_name, late_name = "faccel 1e9, epoch start", "faccel 1e9, resumed at 99 %"
    torch_name = "torch 1e7, epoch start"
    memory = {  # the process first: a peak never falls
        start_name: {
            "process growth MB": process_growth(start),
            "python peak MB": python_peak(start),
        },
        late_name: {"process growth MB": process_growth(late), "python peak MB": python_peak(late)},
        torch_name: {"process growth MB": process_growth(first_batch_of_torch)},
    }
    seconds = alternate({start_name: start, late_name: late}, ROUNDS)
    slow = alternate({torch_name: first_batch_of_torch}, 3, warmup=0)
    first = table("time to the first batch", seconds, start_name, unit="ms")
    first |= table("the same with torch's RandomSampler", slow, torch_name, unit="ms")
    print(
        "  (linear in the number of samples: 100 times that for 1e9, in time and memory; not run)"
    )
    print("\nextra memory to the first batch")
    for name, figures in memory.items():
        text = "   ".join(f"{title} {value:.1f}" for title, value in figures.items())
        print(f"  {name:<28}{text}")

    batches, batches_ratio = compare_worlds("time per batch, whole loader", read_batches)
    rows, rows_ratio = compare_worlds("time per batch, sample numbers alone", make_rows)
    targets = []
    for name in (start_name, late_name):
        targets.append(
            target(f"{name}, ms to the first batch", first[name]["ms"]["median"], at_most=50)
        )
        targets.append(
            target(f"{name}, MB to the first batch", max(memory[name].values()), at_most=50)
        )
    targets.append(
        target("a batch in a world of 512 / of 1, whole loader", batches_ratio, at_most=1.2)
    )
    targets.append(
        target("a batch in a world of 512 / of 1, sample numbers alone", rows_ratio, at_most=1.2)
    )
    report(
        "order",
        {
            "samples": NUM_SAMPLES,
            "batch_size": BATCH_SIZE,
            "batches_per_round": NUM_BATCHES,
            "rounds": ROUNDS,
        },
        {
            "first batch": first,
            "memory": memory,
            "batch": batches,
            "sample numbers of a batch": rows,
        },
        targets,
    )
