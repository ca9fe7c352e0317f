"""Run folders written by hand, as trackers, meters, loggers and ranks write them."""

import json
import os
import socket

from faccel.observe.process import start_ticks

BEGAN_S = 1_700_000_000.0
NONE = {
    "num_steps": 0,
    "useful_s": 0.0,
    "data_wait_s": 0.0,
    "num_skipped": 0,
    "startup_s": 0.0,
    "skipped_s": 0.0,
    "checkpoint_s": 0.0,
    "evaluation_s": 0.0,
}


def write_lines(path, lines):
    """Write JSON lines; text is written as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = [line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines]
    path.write_text("".join(texts))


def event(name, after_s, **values):
    """Return a line of a journal."""
    return {**NONE, "event": name, "time": BEGAN_S + after_s, **values}


def start(after_s=0.0):
    """Return the first line of a process."""
    return event("start", after_s, started=BEGAN_S + after_s, world_size=2)


def write_journal(folder, rank, events):
    """Write the journal of a rank."""
    write_lines(folder / "goodput" / f"rank-{rank:05d}.jsonl", events)


def minutes(data_wait_s=40.0, name="end"):
    """Return the journal of a run of 400 s and 100 steps: 320 s useful, 30 s start-up, waits."""
    times = {"startup_s": 30.0, "data_wait_s": data_wait_s, "checkpoint_s": 10.0}
    times["useful_s"] = 400.0 - sum(times.values())
    return [start(), event(name, 400.0, num_steps=100, **times)]


def write_rank(run_dir, rank=0, world_size=1, **values):
    """Write the file of a rank, by default that of this process."""
    path = run_dir / ".faccel" / f"rank-{rank:05d}.json"
    document = {
        "rank": rank,
        "world_size": world_size,
        "attempt": 0,
        "world": "localhost:1/0",
        "coordinates": {},
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "start_s": BEGAN_S,
        "start_ticks": start_ticks(os.getpid()),
        "folder": "/nowhere",
        "start_folder": "/",
        "signal": 0,
        **values,
    }
    write_lines(path, [document])


def ended(error="", after_s=400.0):
    """Return the end of a rank."""
    return {"error": error, "time_s": BEGAN_S + after_s}
