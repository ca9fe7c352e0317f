"""What importing faccel adds to importing torch, and what `faccel --help` costs; each in a fresh interpreter.

python benchmarks/import_time.py
"""

import os
import re
import subprocess
import sys

from measure import alternate, report, spread, table, target

ROUNDS = 7
HELP_ROUNDS = 30
LOOP = (
    "import torch, faccel; "
    "faccel.init, faccel.shard, faccel.wrap, faccel.wrap_optimizer, faccel.init_scaler, faccel.scaled_backward, "
    "faccel.optimizer_step, faccel.gather, faccel.windows, faccel.batches, faccel.print"
)
UNWANTED = ("tensordict", "yaml", "click", "rich", "cattrs")
TORCH, FACCEL, ACCELERATE = "import torch", "torch and faccel's loop", "import torch, accelerate"
PASS, HELP = "python -c pass", "python -m faccel --help"


def python(*args):
    """Run a fresh interpreter and return what it wrote to standard error."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *args], env=env, check=True, capture_output=True, text=True)
    return done.stderr


def imported(*args):
    """Return the top-level modules that an interpreter run with `args` imports."""
    return set(re.findall(r"^import time:.*\| +([^.\s]+)$", python("-X", "importtime", *args), re.MULTILINE))


if __name__ == "__main__":
    seconds = alternate(
        {
            TORCH: lambda: python("-c", "import torch"),
            FACCEL: lambda: python("-c", LOOP),
            ACCELERATE: lambda: python("-c", "import torch, accelerate"),
        },
        ROUNDS,
        warmup=1,
    )
    rows = table("wall time of a fresh interpreter", seconds, TORCH, unit="ms")
    added = {}
    for name in (FACCEL, ACCELERATE):
        added[name] = spread([(a - b) * 1e3 for a, b in zip(seconds[name], seconds[TORCH], strict=True)])
        print(
            f"  {name:<28} adds {added[name]['median']:.0f} ms "
            f"[{added[name]['first_quartile']:.0f}, {added[name]['third_quartile']:.0f}]"
        )
    help_seconds = alternate(
        {PASS: lambda: python("-c", "pass"), HELP: lambda: python("-m", "faccel", "--help")}, HELP_ROUNDS
    )
    help_rows = table("command line", help_seconds, PASS, unit="ms")

    modules = imported("-c", LOOP)
    assert {"torch", "faccel"} <= modules  # the listing is what it is taken for
    unwanted = sorted(modules & set(UNWANTED))
    help_modules = imported("-m", "faccel", "--help")
    assert {"click", "faccel"} <= help_modules
    print(f"\nunwanted imports of the loop: {unwanted or 'none'}")
    print(f"torch imported by --help: {'torch' in help_modules}")
    report(
        "import_time",
        {"rounds": ROUNDS, "help_rounds": HELP_ROUNDS, "loop": LOOP},
        {
            "fresh interpreter": rows,
            "added to torch, ms": added,
            "command line": help_rows,
            "unwanted imports of the loop": unwanted,
            "torch imported by --help": "torch" in help_modules,
        },
        [
            target("faccel's loop adds to torch, ms", added[FACCEL]["median"], at_most=50),
            target(f"imports of {', '.join(UNWANTED)}", len(unwanted), at_most=0),
            target("torch imported by --help", int("torch" in help_modules), at_most=0),
        ],
    )
    assert not unwanted, unwanted
    assert "torch" not in help_modules
