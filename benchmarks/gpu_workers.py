"""Worker processes that write rows at once, so that an abort or a hang costs one row."""

import dataclasses
import json
import os
import pathlib
import subprocess
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[1]
LINES = "FACCEL_GPU_LINES"  # the variable with the path of the file that a worker writes
STALL_S = 240.0  # without a new row: the first compilation takes a minute
POLL_S = 0.1
TOO_LATE = "it does not fit into --minutes"


@dataclasses.dataclass
class Outcome:
    """The rows so far, by name, and what the workers have written about the node."""

    rows: dict = dataclasses.field(default_factory=dict)
    about: dict = dataclasses.field(default_factory=dict)

    def add(self, row):
        """Add a row; a failure of the same row stays."""
        if self.rows.get(row["name"], {}).get("error") is None:
            self.rows[row["name"]] = row

    def add_missing(self, names, kind, text):
        """Add rows of these names, unless they are there, as skipped or as failed."""
        for name in names:
            if name not in self.rows:
                self.add({"name": name, kind: text})


class Worker:
    """A process that works through names, and writes lines about each."""

    def __init__(self, command, env, folder):
        self.lines_path = folder / "lines.jsonl"
        self.log_path = folder / "log.txt"
        self.lines_path.write_text("")
        with open(self.log_path, "wb") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=env | {LINES: str(self.lines_path)},
                stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def wait(self, deadline, stall_s, clock):
        """Wait for the end; kill the worker at the deadline or if it stalls. Returns the reason."""
        size = 0
        last_change = clock()
        while self.process.poll() is None:
            now = clock()
            new_size = self.lines_path.stat().st_size
            if new_size != size:
                size, last_change = new_size, now
            if now > deadline:
                return self._kill(TOO_LATE)
            if now - last_change > stall_s:
                return self._kill(f"no result in {stall_s:g} s")
            time.sleep(POLL_S)
        if self.process.returncode in (0, 1):  # pytest returns 1 if a test has failed
            return ""
        return f"the worker ended with exit code {self.process.returncode}"

    def _kill(self, reason):
        os.killpg(self.process.pid, 9)  # its group: also the workers of a loader
        self.process.wait()
        return reason

    def lines(self):
        """Return what the worker has written."""
        return [json.loads(line) for line in self.lines_path.read_text().splitlines()]

    def log(self):
        """Return the last lines of the output."""
        return self.log_path.read_text(errors="replace").splitlines()[-12:]


def run_all(
    names, rows_of, command_of, env, deadline, outcome, stall_s=STALL_S, clock=time.monotonic
):
    """Run workers until all names have rows; a worker that ends early costs one name.

    Args:
        names: What to run. The worker may replace it by a longer list.
        rows_of: Returns the names of the rows of a name.
        command_of: Returns the command of a worker for names.
        env: The environment of the workers.
        deadline: When to stop, in the time of `clock`.
        outcome: Gets the rows.
        stall_s: When a worker that writes nothing is killed.
        clock: Returns the time in seconds.
    """
    while names:
        with tempfile.TemporaryDirectory() as folder:
            worker = Worker(command_of(names), env, pathlib.Path(folder))
            reason = worker.wait(deadline, stall_s, clock)
            remaining, current = read_lines(worker, names, rows_of, outcome)
            log = " | ".join(worker.log())
        if reason == TOO_LATE:
            names = remaining
            break
        failed = []
        if current is not None:
            failed = [current]
        elif remaining == names:  # a worker that reaches none would not do so the next time
            failed = names
        for name in failed:
            text = f"{reason or 'the worker ended early'}: {log}"[-700:]
            outcome.add_missing(rows_of(name), "error", text)
        names = [name for name in remaining if name not in failed]
    for name in names:
        outcome.add_missing(rows_of(name), "skipped", TOO_LATE)


def read_lines(worker, names, rows_of, outcome):
    """Add the rows of a worker; return the names without an end, and the one in which it ended."""
    remaining = list(names)
    current = None
    for line in worker.lines():
        outcome.about.update({key: line[key] for key in ("hardware", "versions") if key in line})
        remaining = line.get("names", remaining)
        current = line.get("start", current)
        if "row" in line:
            outcome.add(line["row"])
        for kind in {"skipped", "error"} & line.keys():
            outcome.add_missing(rows_of(current), kind, line[kind])
        if "end" in line:
            remaining = [name for name in remaining if name != line["end"]]
            outcome.add_missing(rows_of(line["end"]), "error", "it has written no row")
            current = None
    return remaining, current
