"""Losses of `examples/char_lm.py` under every strategy, for the table in docs/deepspeed.md.

    python benchmarks/char_lm.py

Needs `pip install transformers`, and DeepSpeed for its rows. No time is measured.
"""

import json
import os
import pathlib
import platform
import re
import subprocess
import sys
from importlib.metadata import version

ROOT = pathlib.Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "char_lm.json"
STEPS = 50
ROWS = {
    "one process": "--nproc 1",
    "DDP": "--nproc 2",
    "FSDP2": "--nproc 2 --mesh dp_shard=2",
    "ZeRO-1": "--nproc 2 --strategy deepspeed --zero 1",
    "ZeRO-2": "--nproc 2 --strategy deepspeed --zero 2",
    "ZeRO-3": "--nproc 2 --strategy deepspeed --zero 3",
}


def faccel_launch(*options):
    """Return the first words of a launch of a script."""
    return [sys.executable, "-m", "faccel", "launch", "--cpu", *options]


def loss_of(flags, steps=STEPS, more=(), launcher=faccel_launch):
    """Run the example; return the loss that it prints in its last line."""
    command = [*launcher(*flags.split()), "examples/char_lm.py"]
    out = subprocess.run(
        [*command, "--steps", str(steps), *more],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    last = (out.stdout.splitlines() or [""])[-1]
    match = re.fullmatch(r"loss (\d+\.\d{4})", last)
    if match is None:
        raise SystemExit(f"{' '.join(command)} ended with {last!r}:\n{out.stderr[-3000:]}")
    return float(match[1])


def table(result):
    """Return the result as a Markdown table."""
    head = (
        "| strategy | `faccel launch --cpu ... examples/char_lm.py --steps 50` | loss |\n"
        "| --- | --- | --: |"
    )
    rows = [f"| {name} | `{ROWS[name]}` | {loss:.4f} |" for name, loss in result["losses"].items()]
    return "\n".join([head, *rows])


def main():
    losses = {}
    for name, flags in ROWS.items():
        losses[name] = loss_of(flags)
        print(f"{name}: {losses[name]:.4f}", flush=True)
    packages = ("torch", "transformers", "deepspeed")
    result = {
        "losses": losses,
        "largest_difference": max(losses.values()) - min(losses.values()),
        "steps": STEPS,
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in packages},
        },
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
