"""What meter, journal, logger and tracker add to a step of 1 ms, in time of the CPU.

A step is a chain of matrix products. The contenders do the same step, and record every one: with a
meter, a meter with a journal, and a meter with a logger and the tracker `jsonl`. They take turns
after each step, so that a disturbance affects all of them.

python benchmarks/meter.py
"""

import gc
import logging
import tempfile
import time

import torch
from measure import ratios, report, spread, table, target

import faccel
from faccel.tracking import finish, init_meter, init_trackers, log, rates, tick

DIM = 128
NUM_STEPS = 5000  # of each contender
WARMUP = 200
RATES_EVERY = 50  # steps
LOG_EVERY = 10
STEP_S = 1e-3


def calibrated_step(matrix):
    """Return a function that takes about a millisecond."""
    product = torch.empty_like(matrix)
    start = time.process_time()
    for _ in range(1000):
        torch.mm(matrix, matrix, out=product)
    num_products = max(1, round(STEP_S / ((time.process_time() - start) / 1000)))

    def step():
        for _ in range(num_products):
            torch.mm(matrix, matrix, out=product)

    return step


def bare(step, ctx):
    return step


def metered(step, ctx, run=None):
    meter = init_meter(ctx, run=run)

    def metered_step():
        nonlocal meter
        step()
        meter = tick(meter, samples=32, tokens=4096)
        if meter.num_steps % RATES_EVERY == 0:
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
        meter = tick(meter, samples=32, tokens=4096)
        logger.debug("step %d", meter.num_steps)
        if meter.num_steps % RATES_EVERY == 0:
            log(rates(meter, ctx).known(), trackers, step=meter.num_steps)
        elif meter.num_steps % LOG_EVERY == 0:
            log({"loss": 0.5}, trackers, step=meter.num_steps)

    return logged_step


def alternate_steps(contenders):
    """Return the seconds of each step by name; other processes of the node do not count."""
    seconds = {name: [] for name in contenders}
    gc.collect()
    gc.freeze()
    for number in range(-WARMUP, NUM_STEPS):
        for name, step in contenders.items():
            start = time.process_time()
            step()
            if number >= 0:
                seconds[name].append(time.process_time() - start)
    return seconds


def measure():
    logging.getLogger("benchmark").setLevel(logging.INFO)
    step = calibrated_step(torch.randn(DIM, DIM))
    makers = {"bare": bare, "meter": metered, "journal": with_journal, "logger, jsonl": logged}
    with tempfile.TemporaryDirectory() as folder:
        contexts = {name: faccel.init(device="cpu", run_dir=folder) for name in makers}
        contenders = {name: make(step, contexts[name]) for name, make in makers.items()}
        seconds = alternate_steps(contenders)
        for ctx in contexts.values():
            faccel.shutdown(ctx)
    return seconds


def mean_of_groups(seconds, size=RATES_EVERY):
    """Return the mean of each group of steps: one of them calls `rates`."""
    return {
        name: [sum(steps[i : i + size]) / size for i in range(0, len(steps), size)]
        for name, steps in seconds.items()
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    seconds = mean_of_groups(measure())
    rows = table("a step of 1 ms, means of 50 steps", seconds, "bare")
    targets = []
    for name in ("meter", "journal", "logger, jsonl"):
        added = spread(ratios(seconds, name, "bare"))["median"]
        targets.append(target(f"{name} / bare", added, at_most=1.01))
    settings = {"steps": NUM_STEPS, "rates_every": RATES_EVERY, "log_every": LOG_EVERY}
    report("meter", settings, {"step of 1 ms": rows}, targets)
