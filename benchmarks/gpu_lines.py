"""What a worker of `benchmarks/gpu.py` writes: one JSON object per line, at once.

So the rows before an abort of the process, as after an illegal memory access, are not lost.
"""

import json
import os

from gpu_workers import LINES


def write(**line):
    """Append a line to the file."""
    with open(os.environ[LINES], "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def short(error):
    """Return the type and the message of an exception on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]
