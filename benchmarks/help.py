"""Time of `faccel --help` and `accelerate --help`, against `python -c pass`.

Target: at most 8 times an interpreter that does nothing.

python benchmarks/help.py
"""

import subprocess
import sys

from measure import alternate, ratios, report, spread, table, target

ROUNDS = 9
COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "faccel --help": ["-m", "faccel", "--help"],
    "faccel launch --help": ["-m", "faccel", "launch", "--help"],
    "faccel config --help": ["-m", "faccel", "config", "--help"],
    "accelerate --help": ["-m", "accelerate.commands.accelerate_cli", "--help"],
    "accelerate launch --help": ["-m", "accelerate.commands.launch", "--help"],
}


def call(words):
    return lambda: subprocess.run([sys.executable, *words], check=True, capture_output=True)


def main():
    seconds = alternate({name: call(words) for name, words in COMMANDS.items()}, ROUNDS, warmup=1)
    results = table("time of --help", seconds, "python -c pass", unit="ms")
    targets = [
        target(
            f"{name} / python -c pass",
            spread(ratios(seconds, name, "python -c pass"))["median"],
            at_most=8,
        )
        for name in COMMANDS
        if name.startswith("faccel")
    ]
    report("help", {"rounds": ROUNDS}, results, targets)


if __name__ == "__main__":
    main()
