"""The journal of a run: what each rank has spent its time on, in one file of JSON lines per rank.

All lines have one length, and the last one is overwritten after each step: a file does not grow
with the number of steps, and a process that is killed leaves the counts of its last complete step.
Restarts of the run append to the same files.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from io import FileIO
from pathlib import Path
from types import MappingProxyType
from typing import Any

import attrs

from faccel.checks import is_finite, local_path, one_of, parse_count
from faccel.context import DistContext, require_context
from faccel.effects import AMBIENT, effectful
from faccel.errors import ConfigError, short_text
from faccel.lifetime import WaitTimes
from faccel.tracking.run_file import write_run_file

# Enough for all counts of a century in microseconds.
_LINE_BYTES = 384
_FOLDER = "goodput"
RATES_FILE = "rates.jsonl"
"""Next to the journals: the results of `rates` on rank 0."""
Event = dict[str, Any]
_COUNTS = (
    *("time", "num_steps", "num_skipped", "startup_s", "useful_s", "data_wait_s", "skipped_s"),
    *("checkpoint_s", "evaluation_s"),
)
# The events, and the numbers that they have besides the counts of the process.
_NUMBERS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "start": ("started", "world_size"),
        "step": (),
        "checkpoint": (),
        "evaluation": (),
        "saved": ("step",),
        "loaded": ("step",),
        "end": (),
    }
)


@attrs.define(eq=False)
class Journal:
    """The open journal of a rank.

    Args:
        path: Its file.
        waits: What the context has done besides steps.
        start_s: Where the time of this process begins, on the clock of `waits`.
        offset_s: What is added to that clock for the time of day.
    """

    path: Path
    waits: WaitTimes
    start_s: float
    offset_s: float
    num_steps: int = attrs.field(default=0, init=False)
    _num_skipped: int = attrs.field(default=0, init=False)
    _startup_s: float = attrs.field(default=0.0, init=False)
    _step_s: float = attrs.field(default=0.0, init=False)
    _data_s: float = attrs.field(default=0.0, init=False)
    _skipped_s: float = attrs.field(default=0.0, init=False)
    # The counts of `waits` that are in the fields above already. Its phases at the start belong to
    # an earlier run of the same context.
    _before: WaitTimes = attrs.field(init=False)
    _loop_s: float = attrs.field(init=False)
    _file: FileIO | None = attrs.field(default=None, init=False)
    _rates_file: FileIO | None = attrs.field(default=None, init=False)
    _offset: int = attrs.field(default=0, init=False)
    _other_counts: str = attrs.field(default="", init=False)
    _has_failed_rates: bool = attrs.field(default=False, init=False)

    def __attrs_post_init__(self) -> None:
        self._before = attrs.evolve(self.waits, phase_s=dict(self.waits.phase_s))
        self._loop_s = self.start_s - self.waits.in_phases_s
        self._other_counts = self._format_other_counts()

    def open(self, rank: int, world_size: int) -> None:
        """Append the first line of this process.

        Raises:
            OSError: The file cannot be created.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.touch()
        # Unbuffered: the system writes a line even if the process is killed a moment later.
        self._file = FileIO(self.path, "r+")
        # The last line may be cut if a node lost its power: the next one begins after its end.
        size = self._file.seek(0, os.SEEK_END)
        self._offset = -(-size // _LINE_BYTES) * _LINE_BYTES
        if size != self._offset:
            self._file.write(b"\n".rjust(self._offset - size))
        values = {"rank": rank, "world_size": world_size}
        self._append("start", {**values, "started": self.start_s + self.offset_s})

    def step(self, now_s: float) -> None:
        """Count a step that has ended at `now_s`, and overwrite the last line."""
        # `waits` counts since the first meter of the context, so differences are added.
        waits, before = self.waits, self._before
        loop_s = now_s - waits.in_phases_s
        data_s = waits.data_s - before.data_s
        work_s = loop_s - self._loop_s - data_s
        is_skipped = waits.num_skips != before.num_skips
        self._loop_s = loop_s
        before.data_s = waits.data_s
        before.num_skips = waits.num_skips
        self._data_s += data_s
        if self.num_steps == 0 or is_skipped:
            self._add_unusual_step(work_s, is_skipped=is_skipped)
        else:
            self._step_s += work_s
        self.num_steps += 1
        self._write("step", now_s, "")

    def _add_unusual_step(self, work_s: float, *, is_skipped: bool) -> None:
        self._num_skipped += is_skipped
        if self.num_steps == 0:  # it compiles and allocates
            self._startup_s += work_s
        else:
            self._skipped_s += work_s
        self._other_counts = self._format_other_counts()

    def note(self, event: str, step: int | None) -> None:
        """Append a line for a checkpoint, or overwrite the last line after a phase, without step.

        A process that is killed in the next step has its time up to here.
        """
        # Phases change between steps only, and end with a note.
        self._other_counts = self._format_other_counts()
        if step is None:
            self._write(event, self.waits.clock(), "")
        else:
            self._append(event, {"step": step})

    def add_rates(self, values: Mapping[str, float]) -> None:
        """Append the result of `rates` to a file of its run, for `faccel report`."""
        if self._file is None or self._has_failed_rates:
            return
        time_s = self.waits.clock() + self.offset_s
        line = json.dumps({"time": time_s, "step": self.num_steps, **values})
        path = self.path.with_name(RATES_FILE)
        try:
            # Unbuffered: a process that is killed leaves complete lines.
            if self._rates_file is None:
                self._rates_file = FileIO(path, "a")
            self._rates_file.write(line.encode() + b"\n")
        except OSError as error:  # a full disk must not stop the training
            self._has_failed_rates = True
            message = "the rates of the run are not stored in `%s` any more: %r"
            logging.getLogger("faccel").error(message, path, error)

    def __call__(self) -> None:
        """Append the last line of this process, when its context is closed."""
        self._append("end", {})
        self._close_file()

    def _append(self, event: str, values: Mapping[str, float]) -> None:
        more = "".join(f', "{name}": {value}' for name, value in values.items())
        self._write(event, self.waits.clock(), more)
        # From here on the line stays: the next one is written after it.
        self._offset += _LINE_BYTES

    def _write(self, event: str, now_s: float, more: str) -> None:
        """Write the last line of the file."""
        if self._file is None:
            return
        # Not `json.dumps`, which takes longer, and only the numbers that an ordinary step changes.
        # Microseconds as integers: after a step of the model, the conversion of a float to text
        # takes as long as all the rest.
        line = (
            f'{{"event": "{event}", "time": {round(1e6 * (now_s + self.offset_s))}e-6{more}'
            f', "num_steps": {self.num_steps}, "useful_s": {round(1e6 * self._step_s)}e-6'
            f', "data_wait_s": {round(1e6 * self._data_s)}e-6{self._other_counts}'
        )
        try:
            text = line.ljust(_LINE_BYTES - 1).encode() + b"\n"
            os.pwrite(self._file.fileno(), text, self._offset)
        except OSError as error:  # a full disk must not stop the training
            message = "the journal `%s` failed, and is not continued: %r"
            logging.getLogger("faccel").error(message, self.path, error)
            self._close_file()

    def _format_other_counts(self) -> str:
        """Return the end of a line, with the counts that change in few steps."""
        phases, phases_before = self.waits.phase_s, self._before.phase_s
        checkpoint_s = phases["checkpoint"] - phases_before["checkpoint"]
        evaluation_s = phases["evaluation"] - phases_before["evaluation"]
        return (
            f', "num_skipped": {self._num_skipped}, "startup_s": {self._startup_s:.6f}'
            f', "skipped_s": {self._skipped_s:.6f}, "checkpoint_s": {checkpoint_s:.6f}'
            f', "evaluation_s": {evaluation_s:.6f}}}'
        )

    def _close_file(self) -> None:
        for file in (self._file, self._rates_file):
            if file is not None:
                file.close()
        self._file = self._rates_file = None


def open_journal(run: str, ctx: DistContext, waits: WaitTimes) -> Journal:
    """Open this rank's journal in the folder of a run, until the context is closed.

    Effects: ambient. Ends the journal of an earlier run of the context.

    Raises:
        ConfigError: `run` is a URL, or its folder cannot be created.
    """
    local_path("run", run)
    path = Path(ctx.config.run_dir) / run / _FOLDER / f"rank-{ctx.rank:05d}.jsonl"
    # The time of day orders the processes of a run; a synthetic clock is used as it is.
    start_s, offset_s = waits.clock(), 0.0
    if waits.clock is time.monotonic:
        offset_s = time.time() - start_s
        # Everything after `init` belongs to the first run of the context.
        if not ctx.lifetime.callbacks(Journal):
            start_s = ctx.lifetime.created_s
    _end_journals(ctx, waits)
    journal = Journal(path, waits, start_s, offset_s)
    try:
        journal.open(ctx.rank, ctx.world_size)
    except OSError as error:
        raise ConfigError(
            "the journal of the run cannot be created in `run_dir`",
            got=f"{short_text(str(path))}: {error.strerror}",
            fix='name a folder in a writable place, as in `run_dir="/tmp/runs"`',
        ) from error
    if ctx.is_main:
        write_run_file(path.parents[1], ctx)
    waits.notes.append(journal.note)
    ctx.lifetime.on_close(journal)
    return journal


def _end_journals(ctx: DistContext, waits: WaitTimes) -> None:
    # Two journals would write into one file if a cell of a notebook runs again.
    for journal in ctx.lifetime.callbacks(Journal):
        journal()
        ctx.lifetime.cancel(journal)
        waits.notes.remove(journal.note)


@effectful(AMBIENT)
def read_journal(folder: str | os.PathLike[str]) -> list[Event]:
    """Return the events of all ranks and restarts of a run, for `goodput`.

    Effects: ambient. Reads files, also those of a run that still trains.

    Args:
        folder: The folder of the run, `run_dir / run`.

    Returns:
        The events of rank 0, then those of rank 1, ..., each with the field `rank`. A line that was
        cut, because its node lost power, is left out.

    Raises:
        ConfigError: The folder has no journal.

    Examples:
        >>> import tempfile
        >>> from faccel.testing import fake_context
        >>> from faccel.tracking import init_meter, tick
        >>> folder = tempfile.mkdtemp()
        >>> ctx = fake_context(0, 1, config={"run_dir": folder})
        >>> meter = tick(init_meter(ctx, run="a"), samples=8)
        >>> [(event["event"], event["num_steps"]) for event in read_journal(f"{folder}/a")]
        [('start', 0), ('step', 1)]
        >>> ctx.lifetime.close()
    """
    paths = sorted(Path(local_path("folder", folder)).glob(f"{_FOLDER}/rank-*.jsonl"))
    if not paths:
        raise ConfigError(
            "`folder` has no journal of a meter",
            got=short_text(os.fsdecode(folder)),
            fix='write `init_meter(ctx, run="name")`, and pass `f"{ctx.config.run_dir}/name"`',
        )
    events: list[Event] = []
    for path in paths:
        rank = parse_count(path.stem.removeprefix("rank-"))
        for line in path.read_bytes().splitlines():
            event = _event(line)
            if event is not None:
                events.append({**event, "rank": rank})
    return events


def _event(line: bytes) -> Event | None:
    # Bytes after a crash may be anything, also invalid UTF-8, which is a ValueError, too.
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    # A line that another program wrote is no event either.
    if not isinstance(event, dict) or str(event.get("event")) not in _NUMBERS:
        return None
    for name in (*_COUNTS, *_NUMBERS[event["event"]]):
        if not is_finite(event.get(name)):
            return None
    return event


@effectful(AMBIENT)
def phase(name: str, ctx: DistContext) -> AbstractContextManager[None]:
    """Return a context whose time belongs to an evaluation, and not to training steps.

    Effects: ambient. Reads the clock of the meter of `ctx`; without one it does nothing. `save` and
    `load` are phases without it.

    Args:
        name: "evaluation" or "checkpoint", for files that faccel does not write.
        ctx: The context.

    Raises:
        ConfigError: The name is another one.

    Examples:
        >>> from faccel.testing import fake_context
        >>> with phase("evaluation", fake_context(0, 1)):
        ...     pass  # the batches of the test set
    """
    require_context(ctx, 'with faccel.tracking.phase("evaluation", ctx):')
    one_of("name", name, ("checkpoint", "evaluation"))
    return ctx.lifetime.phase(name)
