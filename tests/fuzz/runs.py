"""What the fuzzers have in common: seeded cases, their number, audited calls, one printed line.

    FUZZ_SEED=1 FUZZ_CONFIGURATIONS=10000 pytest -n 0 -s tests/fuzz

A case is identified by its label, from which alone it is drawn. `FUZZ_ONLY=label` runs one case.
"""

import os
import random
import sys
import time
import traceback
import warnings
from collections import Counter

SEED = os.environ.get("FUZZ_SEED", "0")
ONLY = os.environ.get("FUZZ_ONLY")
# Events of `sys.addaudithook`: code that is executed, and changes of files.
EXECUTING = (
    "exec", "compile", "import", "marshal.loads", "pickle.find_class", "subprocess.Popen",
    "os.system", "os.exec", "os.posix_spawn", "os.fork", "ctypes.dlopen", "socket.connect",
)  # fmt: skip
WRITING = (
    "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate",
    "os.chmod", "os.chown", "os.utime", "os.setxattr", "shutil.rmtree", "shutil.move",
)  # fmt: skip
_recordings = []  # an audit hook stays installed; it records into the last of these lists


def _record(event, arguments):
    if not _recordings:
        return
    is_write = event == "open" and isinstance(arguments[2], int) and arguments[2] & 3
    if event in EXECUTING or event in WRITING or is_write:
        _recordings[-1].append((event, arguments))


sys.addaudithook(_record)


def cases(name, default):
    """Yield the label and the generator of each case; `FUZZ_<NAME>` is their number."""
    number = int(os.environ.get(f"FUZZ_{name.upper()}") or default)
    labels = [f"{SEED}/{name}/{index}" for index in range(number)]
    if ONLY:
        labels = [label for label in labels if label == ONLY] or [ONLY]
    for label in labels:
        yield label, random.Random(label)


def audited(fn):
    """Return the result of `fn()`, its exception, and the events that it caused."""
    result = error = None
    events = []
    _recordings.append(events)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = fn()
    except BaseException as caught:
        error = caught
    finally:
        _recordings.pop()
    return result, error, events


class Report:
    """Counts outcomes, and prints one line at the end; failures are raised together."""

    def __init__(self, name):
        self.name = name
        self.counts = Counter()
        self.failures = []
        self._start_s = time.monotonic()

    def count(self, outcome):
        self.counts["examples"] += 1
        self.counts[outcome] += 1

    def fail(self, label, what, error=None):
        """Record a failure; the case can be repeated with its label."""
        lines = "".join(traceback.format_exception(error)[-6:]) if error is not None else ""
        self.failures.append(f"FUZZ_ONLY={label}: {what}\n{lines}"[:3000])

    def finish(self):
        """Print the counts, and raise if a case failed."""
        seconds = time.monotonic() - self._start_s
        counts = ", ".join(f"{number:,} {what}" for what, number in self.counts.items())
        failed = f"{len(self.failures)} failures"
        print(f"\nfuzz {self.name}: {counts}, {failed}, seed {SEED}, {seconds:.1f} s")
        assert not self.failures, failed + "\n" + "\n".join(self.failures[:10])
