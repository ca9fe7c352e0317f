"""Everything that can only be checked on a GPU, in one command and less than 9 minutes.

    python benchmarks/gpu.py                                  # correctness, then performance
    python benchmarks/gpu.py --wheels build/gpu_wheels        # on a node without faccel's packages
    python benchmarks/gpu.py --cpu                            # the same rows on the CPU

Runs `tests/gpu` and the measurements of `gpu_table.py`, prints one row for each, and writes them to
a JSON file. faccel, plain PyTorch and Accelerate run in turn on the same work. The exit code is 1
if a row has failed. Limits of time are not judged on a CPU.

Needs nothing but Python itself: what needs PyTorch runs in worker processes. Their rows are written
at once, so an abort of a worker, or one that hangs, costs the row in which it happens.
"""

import argparse
import datetime
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

from gpu_table import MEASUREMENTS
from gpu_workers import ROOT, Outcome, run_all

RESULTS = ROOT / "benchmarks" / "results"


def environment(args, folder):
    """Return the environment of the workers; installs the wheels into `folder`."""
    paths = [str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    env = dict(os.environ)
    env.pop("FACCEL_GPU_TESTS", None)
    if args.wheels:
        # The packages of the node stay as they are.
        wheels = sorted(map(str, pathlib.Path(args.wheels).glob("*.whl")))
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
        subprocess.run([*command, "--target", folder, *wheels], check=True)
        paths.insert(2, folder)
    env["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    env["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    env["FACCEL_GPU_ONLY"] = args.only
    env.setdefault("OMP_NUM_THREADS", "1" if args.cpu else "8")
    if args.cpu:
        env["CUDA_VISIBLE_DEVICES"] = ""
        env["FACCEL_GPU_TESTS"] = "quick" if args.quick else "cpu"
    # Warnings of CUDA and of the compiler are not errors here, as they are in the test suite.
    env["PYTHONWARNINGS"] = "default"
    return env


def check_device(env):
    """Exit if PyTorch finds no GPU; its version and the node are the user's to fix."""
    code = "import torch; print(torch.cuda.is_available())"
    command = [sys.executable, "-c", code]
    answer = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if answer.stdout.strip() != "True":
        sys.exit(f"no CUDA device: use --cpu. {answer.stdout}{answer.stderr[-300:]}")


def test_command(names):
    """Return the command of a worker that runs tests, or all tests of a folder."""
    command = [sys.executable, "-m", "pytest", *names]
    options = ["-o", "addopts=", "-o", "filterwarnings=", "-o", "faulthandler_timeout=150"]
    plugins = ["-p", "no:cacheprovider", "-p", "faccel.testing.plugin", "-p", "gpu_pytest"]
    return [*command, "-q", "--import-mode=importlib", *options, *plugins]


def run(args, folder):
    """Run everything, and write the rows."""
    start = time.monotonic()
    deadline = start + 60 * args.minutes
    env = environment(args, folder)
    outcome = Outcome()
    if not args.cpu:
        check_device(env)
    device, size = ("cpu", "quick" if args.quick else "cpu") if args.cpu else ("cuda:0", "gpu")
    measure = [sys.executable, str(ROOT / "benchmarks" / "gpu_measure.py")]
    measure += ["--device", device, "--size", size]

    def measure_command(names):
        return [*measure, *names]

    def rows_of_measurement(name):
        return [row.name for row in MEASUREMENTS[name]]

    run_all(["tests/gpu"], lambda name: [name], test_command, env, deadline, outcome)
    write(args, outcome, time.monotonic() - start)
    names = [name for name in MEASUREMENTS if args.only in name]
    run_all(names, rows_of_measurement, measure_command, env, deadline, outcome)
    write(args, outcome, time.monotonic() - start)


def judged(row, args):
    """Return the row as the file has it, with its limit and whether it has passed."""
    entry = next((e for rows in MEASUREMENTS.values() for e in rows if e.name == row["name"]), None)
    if entry is None:  # a test
        is_measured = row.get("value") is not None or "error" in row
        passed = "error" not in row if is_measured else None
        fields = {"unit": "s", "ratio": None, "limit": None, "passed": passed}
        return {"name": row["name"], "value": row.get("value")} | fields | texts(row)
    value, ratio = row.get("value"), row.get("ratio")
    compared = ratio if entry.ratio_to else value
    passed = None
    if "error" in row:
        passed = False
    elif entry.at_most is not None and compared is not None and (entry.is_exact or not args.cpu):
        passed = compared <= entry.at_most
    if not entry.ratio_to:
        ratio = None
    fields = {"name": entry.name, "value": value, "unit": entry.unit, "ratio": ratio}
    fields |= {"ratio_to": entry.ratio_to, "limit": entry.at_most, "passed": passed}
    return fields | {"spread": row.get("spread")} | texts(row)


def texts(row):
    return {key: row[key] for key in ("skipped", "error", "note") if key in row}


def write(args, outcome, seconds):
    """Write all rows to the file; after each part, so that a kill of this process loses one."""
    record = {
        "name": "gpu",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": outcome.about.get("hardware"),
        "versions": outcome.about.get("versions"),
        "settings": {"cpu": args.cpu, "quick": args.quick, "minutes": args.minutes},
        "seconds": round(seconds, 1),
        "rows": [judged(row, args) for row in outcome.rows.values()],
    }
    path = pathlib.Path(args.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".new").write_text(json.dumps(record, indent=1) + "\n")
    path.with_suffix(".new").rename(path)
    return record


def line_of(row):
    """Return a row as a line of the table."""
    if "skipped" in row:
        return f"skip  {row['name']}: {row['skipped'][:110]}"
    verdict = {True: "PASS", False: "FAIL", None: "    "}[row["passed"]]
    name = row["name"].removeprefix("tests/gpu/")
    text = f"{verdict}  {name:<70}"
    if row["value"] is not None:
        text += f"{row['value']:>10.4g} {row['unit']}"
    if row.get("ratio") is not None:
        text += f"  x {row['ratio']:.3f} of {row['ratio_to']}"
    if row["limit"] is not None:
        text += f" (at most {row['limit']:g})"
    for key in ("note", "error"):
        if key in row:
            text += f"\n        {row[key]}"
    return text


def main():
    """Print the table; exit with 1 if a row has failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cpu", action="store_true", help="run the same rows on the CPU")
    parser.add_argument("--quick", action="store_true", help="with --cpu: the smallest sizes")
    parser.add_argument("--out", metavar="FILE.json", help="default: benchmarks/results/gpu.json")
    parser.add_argument("--minutes", type=float, default=9.0, help="rows beyond it are skipped")
    parser.add_argument("--wheels", metavar="FOLDER", help="what gpu_wheels.sh has downloaded")
    parser.add_argument("--only", default="", metavar="TEXT", help="rows whose names contain it")
    args = parser.parse_args()
    args.out = args.out or RESULTS / ("gpu_cpu.json" if args.cpu else "gpu.json")
    with tempfile.TemporaryDirectory(prefix="faccel-gpu-") as folder:
        run(args, folder)
    record = json.loads(pathlib.Path(args.out).read_text())
    rows = record["rows"]
    for row in rows:
        print(line_of(row))
    failed = [row["name"] for row in rows if row["passed"] is False]
    skipped = sum("skipped" in row for row in rows)
    if failed:  # once more, because the table is long
        print(f"failed: {', '.join(failed)}")
    device = (record["hardware"] or {}).get("device", "unknown")
    print(f"{len(rows)} rows on {device}, {len(failed)} failed, {skipped} skipped, "
          f"{record['seconds']:.0f} s, written to {args.out}")  # fmt: skip
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
