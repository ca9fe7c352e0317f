"""What meter, journal, logger and tracker add to a training step of 1 ms and to one of 50 ms.

A step trains an MLP on a batch. After it, each contender records it: with a meter; with a meter and
the tracker `jsonl`; with a logger as well; with a meter and a journal; and with what Lightning
Fabric has for it, its `Throughput` and `CSVLogger`. Only the recording is timed, and compared with
the steps around it: its processor caches are those that a step leaves. Collectives have no row,
because PyTorch records them by default, with and without faccel.

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
from measure import report, spread, target
from torch import nn

import faccel
from faccel.tracking import finish, init_meter, init_trackers, log, rates, tick

GROUP = 50  # steps, after which each contender logs: the interval of Lightning
NUM_GROUPS = {"1 ms": 100, "50 ms": 4}
WARMUP = 4  # groups
TOKENS = 4096


def training_step(batch_size, width):
    torch.manual_seed(0)
    layers = [nn.Linear(64, width), nn.ReLU()]
    for _ in range(2):
        layers += [nn.Linear(width, width), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(width, 10))
    opt = torch.optim.SGD(model.parameters(), lr=1e-2)
    x, y = torch.randn(batch_size, 64), torch.randint(10, (batch_size,))

    def step():
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step()

    return step


def nothing(ctx):
    def record(step):
        pass

    return record


def metered(ctx, run=None):
    meter = init_meter(ctx, run=run)

    def record(step):
        nonlocal meter
        meter = tick(meter, samples=128, tokens=TOKENS)
        if step % GROUP == 0:
            rates(meter, ctx)

    return record


def with_journal(ctx):
    return metered(ctx, run="journal")


def tracked(ctx):
    meter = init_meter(ctx)
    trackers = init_trackers("tracked", ctx, trackers=("jsonl",))
    ctx.lifetime.on_close(lambda: finish(trackers))

    def record(step):
        nonlocal meter
        meter = tick(meter, samples=128, tokens=TOKENS)
        if step % GROUP == 0:
            log({"loss": 0.5, **rates(meter, ctx).known()}, trackers, step=step)

    return record


def logged(ctx):
    record_values = tracked(ctx)
    logger = faccel.get_logger("benchmark", ctx)

    def record(step):
        record_values(step)
        if step % GROUP == 0:
            logger.info("step %d: loss %.3f", step, 0.5)

    return record


def fabric(ctx):
    throughput = Throughput(window_size=GROUP)
    logger = CSVLogger(ctx.config.run_dir)
    start = time.monotonic()

    def record(step):
        throughput.update(
            time=time.monotonic() - start,
            batches=step,
            samples=step * 128,
            lengths=step * TOKENS,
        )
        if step % GROUP == 0:
            logger.log_metrics({"loss": 0.5, **throughput.compute()}, step)

    return record


CONTENDERS = {
    "nothing": nothing,
    "meter": metered,
    "meter, jsonl": tracked,
    "meter, jsonl, logger": logged,
    "meter, journal": with_journal,
    "Fabric: Throughput, CSVLogger": fabric,
}


def measure(step, records, num_groups):
    """Return the seconds of the steps and of the recording in each group, by name."""
    clock = time.perf_counter
    groups = {name: [] for name in records}
    gc.collect()
    gc.freeze()
    for number in range(WARMUP + num_groups):
        for name, record in records.items():
            step_s = record_s = 0.0
            for index in range(1, GROUP + 1):
                start = clock()
                step()
                middle = clock()
                record(number * GROUP + index)
                record_s += clock() - middle
                step_s += middle - start
            if number >= WARMUP:
                groups[name].append((step_s, record_s))
    return groups


def results_of(title, batch_size, width):
    """Measure, print and return a row per contender."""
    logging.getLogger("benchmark").setLevel(logging.INFO)
    logging.getLogger("benchmark").addHandler(logging.NullHandler())
    with tempfile.TemporaryDirectory() as folder:
        contexts = {name: faccel.init(device="cpu", run_dir=folder) for name in CONTENDERS}
        records = {name: make(contexts[name]) for name, make in CONTENDERS.items()}
        groups = measure(training_step(batch_size, width), records, NUM_GROUPS[title])
        for ctx in contexts.values():
            faccel.shutdown(ctx)
    print(f"\na step of {title}")
    rows = {}
    # The clock is read around each call, which takes a part of a microsecond itself.
    clock_s = spread([record_s for _, record_s in groups.pop("nothing")])["median"]
    for name, pairs in groups.items():
        added = spread([(record_s - clock_s) / GROUP * 1e6 for _, record_s in pairs])
        parts = spread([(record_s - clock_s) / step_s for step_s, record_s in pairs])
        step_us = spread([step_s / GROUP * 1e6 for step_s, _ in pairs])["median"]
        rows[name] = {"step, us": step_us, "added, us": added, "part of the step": parts}
        print(
            f"  {name:<32}{step_us:>9.1f} us + {added['median']:>6.2f} us "
            f"[{added['first_quartile']:.2f}, {added['third_quartile']:.2f}]"
            f"   {100 * parts['median']:.2f} %"
        )
    return rows


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.getLogger("lightning_fabric").setLevel(logging.ERROR)
    rows = {
        "1 ms": results_of("1 ms", batch_size=192, width=128),
        "50 ms": results_of("50 ms", batch_size=1024, width=512),
    }
    targets = []
    for title, at_most in (("1 ms", 0.01), ("50 ms", 0.001)):
        part = rows[title]["meter, jsonl, logger"]["part of the step"]["median"]
        targets.append(target(f"meter, jsonl, logger: part of {title}", part, at_most=at_most))
    added = {name: row["added, us"]["median"] for name, row in rows["1 ms"].items()}
    ratio = added["meter, jsonl"] / added["Fabric: Throughput, CSVLogger"]
    targets.append(target("meter, jsonl / Fabric: Throughput, CSVLogger", ratio, at_most=1))
    report("meter", {"logged every": GROUP}, rows, targets)
