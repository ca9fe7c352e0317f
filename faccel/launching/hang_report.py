"""The report of a hang: the launcher asks the ranks when none of them has moved for long."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import attrs

from faccel.errors import ConfigError, printable
from faccel.launching.spec import LaunchSpec
from faccel.observe.ask import ask
from faccel.observe.rank_file import FOLDER, write
from faccel.observe.snapshot import ANSWERED, Snapshot
from faccel.observe.verdict import BROKEN, HUNG, Verdict, verdict

WHY_TEXT, WHY_JSON = "why.txt", "why.json"
"""In the folder of the ranks' files."""
_LOOK_S, _WATCH_S, _INTERVAL_S = 0.02, 1.0, 0.005
_MIN_PERIOD_S, _MAX_PERIOD_S = 0.5, 30.0


@attrs.define(eq=False)
class SilentInterval:
    """For how long no rank has begun a collective or a step.

    Args:
        interval_s: After how many seconds a report is due, once.
    """

    interval_s: float
    _marks: dict[int, object] = attrs.field(factory=dict, init=False)
    _moved_s: float = attrs.field(default=0.0, init=False)
    _has_begun: bool = attrs.field(default=False, init=False)
    _is_reported: bool = attrs.field(default=False, init=False)

    def is_due(self, snapshots: Iterable[Snapshot], now_s: float) -> bool:
        """Return whether a report is due, after a look at the ranks."""
        for snapshot in snapshots:
            # Of a rank that does not answer nothing new is known.
            if snapshot.status != ANSWERED or not snapshot.moments:
                continue
            numbers = sorted(snapshot.moments[-1].numbers.items())
            mark = (snapshot.pid, snapshot.step, numbers)
            if mark != self._marks.get(snapshot.rank):
                self._marks[snapshot.rank] = mark
                self._moved_s, self._is_reported = now_s, False
            # Imports, the first batch and a loop without faccel are no hang.
            self._has_begun = self._has_begun or snapshot.step > 0 or any(n for _, n in numbers)
        if not self._has_begun or self._is_reported:
            return False
        self._is_reported = now_s - self._moved_s >= self.interval_s
        return self._is_reported

    def next_look_s(self, now_s: float) -> float:
        """Return after how many seconds to look again: rarely, and often before a report is due."""
        period_s = min(self.interval_s / 10, _MAX_PERIOD_S)
        if self._has_begun and not self._is_reported:
            period_s = min(period_s, self._moved_s + self.interval_s - now_s)
        return max(period_s, _MIN_PERIOD_S)


@contextmanager
def reporting_hangs(spec: LaunchSpec, run_dir: object) -> Generator[None]:
    """Report a hang while the body runs the ranks, on node 0 and in an observed run only.

    Effects: ambient. Starts a thread, which writes to standard error and into the run folder. The
    ranks are neither stopped nor ended.
    """
    # Every node sees the same silence: one report is enough.
    if run_dir is None or not spec.hang_report_s or spec.node_rank:
        yield
        return
    is_ended = threading.Event()
    arguments = (str(run_dir), spec.hang_report_s, is_ended)
    thread = threading.Thread(target=_watch, args=arguments, name="faccel-hangs", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_ended.set()
        thread.join(timeout=_WATCH_S)


def _watch(run_dir: str, interval_s: float, is_ended: threading.Event) -> None:
    silence = SilentInterval(interval_s)
    start_s = time.time()
    while not is_ended.wait(silence.next_look_s(time.monotonic())):
        # A file of an earlier run is in the folder until the ranks have reached `init`.
        with suppress(ConfigError, OSError):
            snapshots = ask(run_dir, duration_s=_LOOK_S, interval_s=_INTERVAL_S)
            if silence.is_due(snapshots, time.monotonic()):
                snapshots = ask(run_dir, duration_s=_WATCH_S, interval_s=_INTERVAL_S)
                _report(verdict(snapshots), run_dir, interval_s, start_s)


def _report(result: Verdict, run_dir: str, interval_s: float, start_s: float) -> None:
    """Print and write a verdict, unless the ranks have moved meanwhile."""
    if result.kind not in (HUNG, BROKEN):
        return
    lines = _lines(result, interval_s)
    text = "\n".join(map(printable, lines)) + "\n"
    sys.stderr.write(f"\n{text}")
    folder = Path(run_dir).absolute() / FOLDER
    now_s = time.time()
    document = {"time_s": now_s, "launched_s": start_s, **attrs.asdict(result)}
    (folder / WHY_TEXT).write_text(text, encoding="utf-8")
    write(folder / WHY_JSON, json.loads(json.dumps(document)))


def _lines(result: Verdict, interval_s: float) -> Sequence[str]:
    start = f"no rank has begun a collective or a step for {interval_s:g} s"
    lines = [start, result.sentence, *result.evidence]
    if result.next_step:
        lines.append(f"To fix: {result.next_step}.")
    return lines
