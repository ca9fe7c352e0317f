"""What importing faccel adds to importing torch, and what `faccel --help` costs.

Each measurement runs in a fresh interpreter. The addition is measured twice: as the difference of
two interpreters, exit included, and inside one interpreter after the end of `import torch`, with
garbage collection off. Importing torch takes a second and varies, so the difference is good to
about 30 ms on 2 cores: look at its quartiles before its median.

The first, untimed round writes the bytecode cache. Otherwise an editable install would be compiled
at each start where PYTHONDONTWRITEBYTECODE is set, and the installed packages would not.

    python benchmarks/import_time.py
"""

import os
import re
import subprocess
import sys
import tempfile

from measure import alternate, report, spread, table, target

ROUNDS = 13
HELP_ROUNDS = 30
LIMIT_MS = 50
LIMIT_RATIO = 0.6  # of what `import accelerate` adds
CLOCK = (
    "import gc, time, torch; gc.collect(); gc.disable(); start = time.perf_counter(); {}; "
    "print((time.perf_counter() - start) * 1e3)"
)
LOOP = (
    "import faccel; faccel.init, faccel.shard, faccel.wrap, faccel.wrap_optimizer, "
    "faccel.init_scaler, faccel.scaled_backward, faccel.optimizer_step, faccel.gather, "
    "faccel.windows, faccel.batches, faccel.print"
)
STATEMENTS = {
    "torch": "pass",
    "torch, faccel's loop": LOOP,
    "torch, accelerate": "import accelerate",
}
BYTECODE = tempfile.TemporaryDirectory()
UNWANTED = ("tensordict", "yaml", "click", "rich", "cattrs")


def python(*args):
    """Run a fresh interpreter; return what it wrote to standard output and to standard error."""
    env = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPYCACHEPREFIX": BYTECODE.name,
        "PYTHONDONTWRITEBYTECODE": "",
    }
    done = subprocess.run(
        [sys.executable, *args], env=env, check=True, capture_output=True, text=True
    )
    return done.stdout, done.stderr


def imported(*args):
    """Return the top-level modules that an interpreter run with `args` imports."""
    listing = python("-X", "importtime", *args)[1]
    return set(re.findall(r"^import time:.*\| +([^.\s]+)$", listing, re.MULTILINE))


def timed(statement, inside):
    """Return a function that runs `statement` after `import torch`.

    It appends the milliseconds of the statement alone to `inside`.
    """
    return lambda: inside.append(float(python("-c", CLOCK.format(statement))[0]))


if __name__ == "__main__":
    inside = {name: [] for name in STATEMENTS}
    contenders = {name: timed(statement, inside[name]) for name, statement in STATEMENTS.items()}
    seconds = alternate(contenders, ROUNDS, warmup=1)
    rows = table("a fresh interpreter that imports", seconds, "torch", unit="ms")
    print("\nadded to `import torch`")
    added = {}
    for name in list(STATEMENTS)[1:]:
        difference = [(a - b) * 1e3 for a, b in zip(seconds[name], seconds["torch"], strict=True)]
        added[name] = {
            "inside, ms": spread(inside[name][-ROUNDS:]),
            "difference, ms": spread(difference),
        }
        for how, figures in added[name].items():
            print(
                f"  {name:<22}{how:<26}",
                "{median:.0f} [{first_quartile:.0f}, {third_quartile:.0f}]".format(**figures),
            )

    faccel_ms, peer_ms = (inside[name][-ROUNDS:] for name in list(STATEMENTS)[1:])
    ratio = spread([a / b for a, b in zip(faccel_ms, peer_ms, strict=True)])
    print(f"  faccel's loop / accelerate: {ratio['median']:.2f}")

    nothing, help_ = "python -c pass", "python -m faccel --help"
    help_seconds = alternate(
        {nothing: lambda: python("-c", "pass"), help_: lambda: python("-m", "faccel", "--help")},
        HELP_ROUNDS,
    )
    help_rows = table("command line", help_seconds, nothing, unit="ms")

    modules = imported("-c", LOOP)
    help_modules = imported("-m", "faccel", "--help")
    assert {"torch", "faccel"} <= modules and {
        "click",
        "faccel",
    } <= help_modules  # the listing was parsed
    unwanted = sorted(modules & set(UNWANTED))
    help_imports_torch = "torch" in help_modules
    print(f"\nunwanted imports of the loop: {unwanted or 'none'}")
    print(f"torch imported by --help: {help_imports_torch}")
    report(
        "import_time",
        {"rounds": ROUNDS, "help_rounds": HELP_ROUNDS, "loop": LOOP},
        {
            "fresh interpreter": rows,
            "added to torch": added,
            "faccel's loop / accelerate, inside": ratio,
            "command line": help_rows,
            "unwanted imports of the loop": unwanted,
            "torch imported by --help": help_imports_torch,
        },
        [
            *(
                target(
                    f"faccel's loop adds to `import torch`, {how}",
                    figures["median"],
                    at_most=LIMIT_MS,
                )
                for how, figures in added["torch, faccel's loop"].items()
            ),
            target("faccel's loop / accelerate", ratio["median"], at_most=LIMIT_RATIO),
            target(f"imports of {', '.join(UNWANTED)} by the loop", len(unwanted), at_most=0),
            target("imports of torch by --help", int(help_imports_torch), at_most=0),
        ],
    )
    assert not unwanted and not help_imports_torch
