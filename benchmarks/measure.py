"""Alternating measurements, ratios with their spread, and a result file that names the hardware.

Contenders run A, B, C, A, B, C, ..., so that a disturbance affects all of them. A ratio is computed
within one round; the median over the rounds is reported, with the quartiles as its spread.
"""

import datetime
import gc
import json
import os
import platform
import statistics
import time
from importlib import metadata
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "numpy", "attrs", "faccel", "accelerate", "lightning-fabric")


def alternate(contenders, rounds, *, warmup=2, before=lambda: None, clock=time.perf_counter):
    """Call each contender once per round, in turn; return the seconds of each round by name.

    `before` runs before each call and is not timed (a barrier, if there are several processes).
    With `clock=time.process_time` other processes of the node do not count.
    """
    seconds = {name: [] for name in contenders}
    gc.collect()
    gc.freeze()  # the collections below skip everything that was imported
    for number in range(-warmup, rounds):
        for name, run in contenders.items():
            gc.collect()  # a contender does not pay for the garbage of another one
            before()
            start = clock()
            run()
            if number >= 0:
                seconds[name].append(clock() - start)
    return seconds


def spread(values):
    """Return the median and the quartiles."""
    first, middle, third = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "first_quartile": first, "third_quartile": third}


def ratios(seconds, contender, baseline):
    """Return contender / baseline of each round."""
    return [a / b for a, b in zip(seconds[contender], seconds[baseline], strict=True)]


def table(title, seconds, baseline, *, calls=1, unit="us"):
    """Print one row per contender: the time of one call and the ratio to the baseline.

    `calls` is the number of calls in a round. Returns the same figures as a record.
    """
    factor = {"us": 1e6, "ms": 1e3, "s": 1.0}[unit] / calls
    print(f"\n{title}")
    rows = {}
    for name in seconds:
        amount = spread([x * factor for x in seconds[name]])
        ratio = spread(ratios(seconds, name, baseline))
        rows[name] = {unit: amount, f"ratio to {baseline}": ratio}
        print(
            f"  {name:<28}{amount['median']:>10.1f} {unit} [{amount['first_quartile']:.1f}, "
            f"{amount['third_quartile']:.1f}]   x {ratio['median']:.3f} "
            f"[{ratio['first_quartile']:.3f}, {ratio['third_quartile']:.3f}]"
        )
    return rows


def target(text, value, *, at_most=None, at_least=None):
    """Return whether `value` is within its limit, as a record for `report`."""
    holds = (at_most is None or value <= at_most) and (at_least is None or value >= at_least)
    limit = f"at most {at_most:g}" if at_least is None else f"at least {at_least:g}"
    return {"target": f"{text}: {limit}", "measured": value, "holds": holds}


def report(name, settings, results, targets):
    """Print PASS or FAIL for each target, and write everything to `results/<name>.json`."""
    print()
    for record in targets:
        verdict = "PASS" if record["holds"] else "FAIL"
        print(f"{verdict}  {record['target']} (measured {record['measured']:.3g})")
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    record = {
        "name": name,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": hardware(),
        "versions": {
            "python": platform.python_version(),
            **{package: _version(package) for package in PACKAGES},
        },
        "settings": settings,
        "results": results,
        "targets": targets,
    }
    path.write_text(json.dumps(_rounded(record), indent=2) + "\n")
    print(f"written to {path}")


def _version(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # this benchmark does not use it
        return None


def hardware():
    """Return the hardware and the load average, which shows whether the benchmark ran alone."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    models = [
        line.split(":", 1)[1].strip() for line in info.splitlines() if line.startswith("model name")
    ]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "load_average_1min": os.getloadavg()[0],
    }


def _rounded(value):
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value
