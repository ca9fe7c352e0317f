"""What meter, journal, logger and tracker add to a training step of 1 ms, in time of the CPU.

A step trains an MLP on a batch. The contenders do the same step, and record every one: with a
meter, a meter with a journal, and a meter with a logger and the tracker `jsonl`; beside them, with
what Lightning Fabric has for it, its `Throughput` and `CSVLogger`. They take turns after 10 steps,
so that a disturbance affects all of them.

python benchmarks/meter.py
"""

import gc
import logging
import tempfile
import time

import torch
import torch.nn.functional as F
from lightning_fabric.loggers import CSVLogger
from lightning_fabric.utilities.throughput import Throughput
from measure import ratios, report, spread, table, target
from torch import nn

import faccel
from faccel.tracking import finish, init_meter, init_trackers, log, rates, tick

WIDTH = 128
BATCH_SIZE = 128
GROUP = 50  # steps, after which each contender logs: the interval of Lightning
NUM_GROUPS = 100
WARMUP = 4  # groups
TURN = 10  # steps of one contender: the first one finds the caches of another


def training_step():
    """Return a function that takes about a millisecond."""
    torch.manual_seed(0)
    layers = [nn.Linear(64, WIDTH), nn.ReLU()]
    for _ in range(2):
        layers += [nn.Linear(WIDTH, WIDTH), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(WIDTH, 10))
    opt = torch.optim.SGD(model.parameters(), lr=1e-2)
    x, y = torch.randn(BATCH_SIZE, 64), torch.randint(10, (BATCH_SIZE,))

    def step():
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step()

    return step


def bare(step, ctx):
    return step


def metered(step, ctx, run=None):
    meter = init_meter(ctx, run=run)

    def metered_step():
        nonlocal meter
        step()
        meter = tick(meter, samples=BATCH_SIZE, tokens=4096)
        if meter.num_steps % GROUP == 0:
            rates(meter, ctx)

    return metered_step


def with_journal(step, ctx):
    return metered(step, ctx, run="journal")


def logged(step, ctx):
    meter = init_meter(ctx)
    logger = faccel.get_logger("benchmark", ctx)
    trackers = init_trackers("logged", ctx, trackers=("jsonl",))
    ctx.lifetime.on_close(lambda: finish(trackers))

    def logged_step():
        nonlocal meter
        step()
        meter = tick(meter, samples=BATCH_SIZE, tokens=4096)
        if meter.num_steps % GROUP == 0:
            logger.info("step %d: loss %.3f", meter.num_steps, 0.5)
            values = {"loss": 0.5, **rates(meter, ctx).known()}
            log(values, trackers, step=meter.num_steps)

    return logged_step


def fabric(step, ctx):
    throughput = Throughput(window_size=GROUP)
    logger = CSVLogger(ctx.config.run_dir)
    start, num_steps = time.monotonic(), 0

    def logged_step():
        nonlocal num_steps
        step()
        num_steps += 1
        throughput.update(
            time=time.monotonic() - start,
            batches=num_steps,
            samples=num_steps * BATCH_SIZE,
            lengths=num_steps * 4096,
        )
        if num_steps % GROUP == 0:
            logger.log_metrics({"loss": 0.5, **throughput.compute()}, num_steps)

    return logged_step


def alternate(contenders, num_groups):
    """Return the mean seconds of a step of each group by name; other processes do not count."""
    seconds = {name: [] for name in contenders}
    gc.collect()
    gc.freeze()
    for number in range(-WARMUP, num_groups):
        totals = dict.fromkeys(contenders, 0.0)
        for _ in range(GROUP // TURN):
            for name, step in contenders.items():
                start = time.process_time()
                for _ in range(TURN):
                    step()
                totals[name] += time.process_time() - start
        if number >= 0:
            for name, total in totals.items():
                seconds[name].append(total / GROUP)
    return seconds


def measure(num_groups):
    logging.getLogger("benchmark").setLevel(logging.INFO)
    step = training_step()
    makers = {
        "bare": bare,
        "meter": metered,
        "meter, logger, jsonl": logged,
        "meter, journal": with_journal,
        "Fabric: Throughput, CSVLogger": fabric,
    }
    with tempfile.TemporaryDirectory() as folder:
        contexts = {name: faccel.init(device="cpu", run_dir=folder) for name in makers}
        contenders = {name: make(step, contexts[name]) for name, make in makers.items()}
        seconds = alternate(contenders, num_groups)
        for ctx in contexts.values():
            faccel.shutdown(ctx)
    return seconds


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.getLogger("lightning_fabric").setLevel(logging.ERROR)
    seconds = measure(NUM_GROUPS)
    rows = table("a step of 1 ms, means of 50 steps", seconds, "bare")
    added = {name: spread(ratios(seconds, name, "bare"))["median"] for name in seconds}
    targets = [target("meter, logger, jsonl / bare", added["meter, logger, jsonl"], at_most=1.01)]
    settings = {"steps": GROUP * NUM_GROUPS, "logged every": GROUP, "batch": BATCH_SIZE}
    report("meter", settings, {"step of 1 ms": rows}, targets)
