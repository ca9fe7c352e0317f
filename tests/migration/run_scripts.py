"""Runs scripts one after the other in this process; prints the numbers that each printed as JSON.

python -m tests.migration.run_scripts FOLDER NAME ...
"""

import contextlib
import io
import json
import os
import runpy
import sys
import traceback


def reset_accelerate():
    """Accelerate has process-wide state: a second `Accelerator` would get that of the first."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def numbers_of(text):
    """Return the numbers in the lines that begin with "loss" or "rate"."""
    numbers = []
    for line in text.splitlines():
        word, *values = line.split()[:4] or [""]
        if word in ("loss", "rate"):
            numbers += [float(value) for value in values]
    return numbers


def run(path):
    out = io.StringIO()
    sys.argv = [path]
    result = {}
    try:
        with contextlib.redirect_stdout(out):
            runpy.run_path(path, run_name="__main__")
    except Exception:
        result["error"] = traceback.format_exc()
    return {**result, "numbers": numbers_of(out.getvalue())}


def main(folder, *names):
    results = {}
    for name in names:
        if "accelerate" in sys.modules:
            reset_accelerate()
        results[name] = run(os.path.join(folder, name))
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
