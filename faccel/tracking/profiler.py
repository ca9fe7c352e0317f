"""Profiles: what each rank spends a step on, and one trace of all ranks."""

from __future__ import annotations

import json
import logging
import os
import socket
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import attrs
import torch

from faccel.checks import integer, local_path
from faccel.context import DistContext, require_context
from faccel.device_table import is_host
from faccel.effects import AMBIENT, COLLECTIVE, effectful
from faccel.errors import ConfigError, short_repr, short_text
from faccel.mesh import WORLD
from faccel.tracking import trace_files
from faccel.tracking.clock_offsets import Offset, exchange_times, node_id, offsets_of
from faccel.tracking.spans import Interval, seconds_of

if TYPE_CHECKING:
    from torch.profiler import ProfilerAction
    from torch.profiler import profile as TorchProfile

_logger = logging.getLogger(__name__)
_FIX_SCHEDULE = "write `schedule=torch.profiler.schedule(wait=1, warmup=1, active=3)`"
# One profile per process: PyTorch has one profiler.
_open_profiles: list[object] = []


@attrs.frozen
class ProfileSummary:
    """What a profile has recorded; equal on all ranks.

    Args:
        path: The trace of all ranks.
        seconds: By rank, then by span: "data", "forward", "backward", "communication", "optimizer",
            "checkpoint" and "evaluation". Spans overlap: ranks communicate during a backward.
        num_steps: Steps that were recorded: calls of `step` while the schedule records.
        missing: Why the trace of a rank is not in the file, by rank.
        clock_error_s: How far the clock of a node may be from that of rank 0; 0 on one node.
    """

    path: Path
    seconds: Mapping[int, Mapping[str, float]]
    num_steps: int
    missing: Mapping[int, str]
    clock_error_s: float


class Profiler:
    """An open profile, from `profile`.

    `step()` ends a step. `summary` is there after the `with` statement.
    """

    def __init__(
        self, ctx: DistContext, path: Path, torch_profile: TorchProfile | None, ranks: Sequence[int]
    ) -> None:
        self._ctx = ctx
        self._path = path
        self._ranks = ranks
        self._offset = Offset()
        self._clock_error_s = 0.0
        self._num_steps = 0
        self._cycle_files: list[Path] = []
        self._cycle_problem = ""
        self._is_used = False
        self._summary: ProfileSummary | None = None
        self.torch_profile = torch_profile
        """PyTorch's profile, for `key_averages()`; None on ranks that record none."""

    @property
    def summary(self) -> ProfileSummary:
        """What was recorded.

        Raises:
            ConfigError: The `with` statement has not ended.
        """
        if self._summary is None:
            raise ConfigError(
                "a profile has its summary after the `with` statement",
                got="a profile that is open or ended in an error",
                fix="read `profiler.summary` after the indented lines",
            )
        return self._summary

    def step(self) -> None:
        """End a step of the schedule."""
        if self.torch_profile is None:
            return
        if self.torch_profile.current_action.name.startswith("RECORD"):
            self._num_steps += 1
        with warnings.catch_warnings():
            # Each cycle is written when it ends.
            warnings.filterwarnings("ignore", "Warning: Profiler clears events")
            self.torch_profile.step()

    def __enter__(self) -> Profiler:
        ctx = self._ctx
        problem = self._problem()
        process = f"{node_id()}/{os.getpid()}"
        row = {"problem": problem, "process": process, "node": node_id()}
        rows = _exchange(row, ctx)
        _raise_problems(rows, self._ranks)
        starts, ends = exchange_times(ctx, time.time_ns)
        offsets = offsets_of(starts, ends, [row["node"] for row in rows])
        self._offset = offsets[ctx.rank]
        self._clock_error_s = max(offset.error_ns for offset in offsets) / 1e9
        if self.torch_profile is not None:
            self._is_used = True
            _open_profiles.append(self)
            self.torch_profile.on_trace_ready = self._keep
            self.torch_profile.start()
            ctx.lifetime.record_spans(torch.profiler.record_function)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        row: dict[str, Any] = {"seconds": {}, "num_steps": 0, "problem": "", "base_ns": 0}
        if self.torch_profile is not None:
            self._ctx.lifetime.record_spans(None)
            _open_profiles.remove(self)
            self.torch_profile.stop()
            row = self._write()
        # The other ranks may not come here.
        if error is None:
            self._finish(_exchange(row, self._ctx))

    def _problem(self) -> str:
        """Return why this rank cannot begin, or nothing."""
        if self.torch_profile is None:
            return ""
        # It would take the events of the other one, which would be empty.
        is_profiled = torch.autograd._profiler_enabled()  # pyright: ignore[reportPrivateUsage]
        if _open_profiles or is_profiled:
            return "has an open profile already"
        if self._is_used:
            return "has ended this profile, which can be opened once"
        folder = trace_files.rank_folder(self._path)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # A folder that exists may be read-only.
            trace_files.rank_file(self._path, self._ctx.rank).write_bytes(b"")
        except OSError as error:
            return f"cannot write {short_text(str(folder))}: {error.strerror}"
        return ""

    def _keep(self, profile: TorchProfile) -> None:
        """Write the trace of a cycle of the schedule."""
        name = f"rank-{self._ctx.rank:05}.{len(self._cycle_files)}.json"
        path = trace_files.rank_folder(self._path) / name
        # An error here would leave PyTorch's profiler in a state in which it crashes.
        try:
            profile.export_chrome_trace(str(path))
            self._cycle_files.append(path)
        except OSError as error:
            self._cycle_problem = f"its trace could not be written: {error}"

    def _write(self) -> dict[str, Any]:
        """Write the trace of this rank; return its part of the summary."""
        rank, problem, base_ns = self._ctx.rank, self._cycle_problem, 0
        intervals: Mapping[str, list[Interval]] = {}
        try:
            documents = [trace_files.read_torch(path) for path in self._cycle_files]
            trace, intervals = trace_files.from_torch(
                documents, rank, socket.gethostname(), self._offset.offset_ns
            )
            base_ns = trace.base_ns
            trace_files.write_rank(trace, trace_files.rank_file(self._path, rank))
            for path in self._cycle_files:
                path.unlink()
        except (OSError, ValueError) as error:
            problem = f"its trace could not be written: {error}"
        seconds = seconds_of(intervals)
        counts = {"num_steps": self._num_steps, "base_ns": base_ns}
        return {"seconds": seconds, "problem": problem, **counts}

    def _finish(self, rows: Sequence[Mapping[str, Any]]) -> None:
        missing: dict[int, str] = {}
        if self._ctx.is_main:
            missing = {rank: rows[rank]["problem"] for rank in self._ranks if rows[rank]["problem"]}
            ranks = [rank for rank in self._ranks if rank not in missing]
            # A rank that has recorded nothing has no time.
            starts_ns = [row["base_ns"] for row in rows if row["base_ns"]]
            missing |= _merged(self._path, ranks, min(starts_ns, default=0))
        # Rank 0 alone has tried to read the files.
        pairs = _exchange(list(missing.items()), self._ctx)[0]
        self._summary = ProfileSummary(
            path=self._path,
            seconds={rank: rows[rank]["seconds"] for rank in self._ranks},
            num_steps=max(row["num_steps"] for row in rows),
            missing=dict(pairs),
            clock_error_s=self._clock_error_s,
        )


def _merged(path: Path, ranks: Sequence[int], start_ns: int) -> dict[int, str]:
    """Write the trace of all ranks; return which of them are missing, and why."""
    try:
        missing = trace_files.merge(path, ranks, start_ns)
    except OSError as error:
        # A full disk must not end the training; the traces of the ranks are complete.
        missing = dict.fromkeys(ranks, f"the trace of all ranks could not be written: {error}")
    for rank, reason in missing.items():
        _logger.error("the profile `%s` has no trace of rank %d: %s", path, rank, reason)
    return missing


def _exchange(value: object, ctx: DistContext) -> list[Any]:
    """Return what every rank has passed, in the order of ranks, as JSON."""
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    sizes = ctx.comm.all_gather(torch.tensor([len(data)], device=ctx.device), WORLD).ravel()
    padded = torch.zeros(int(sizes.max()), dtype=torch.uint8)
    padded[: len(data)] = data
    rows = ctx.comm.all_gather(padded.to(ctx.device), WORLD).cpu()
    texts = [bytes(row[:size].tolist()) for row, size in zip(rows, sizes.tolist(), strict=True)]
    return [json.loads(text) for text in texts]


def _raise_problems(rows: Sequence[Mapping[str, Any]], ranks: Sequence[int]) -> None:
    """Raise the first problem of a rank on all of them."""
    for rank, row in enumerate(rows):
        if row["problem"]:
            raise ConfigError(
                "a profile cannot begin",
                got=f"rank {rank} {row['problem']}",
                fix="end the other profile first, and write to a folder that every rank can write",
            )
    rank_of: dict[str, int] = {}
    for rank in ranks:
        first = rank_of.setdefault(rows[rank]["process"], rank)
        # PyTorch has one profiler per process.
        if first != rank:
            raise ConfigError(
                "a process can profile one rank",
                got=f"ranks {first} and {rank} in one process, as in a simulation",
                fix=f"pass `ranks=({first},)`",
            )


@effectful(AMBIENT, COLLECTIVE)
def profile(
    ctx: DistContext,
    *,
    path: str | os.PathLike[str] | None = None,
    schedule: Callable[[int], ProfilerAction] | None = None,
    ranks: Sequence[int] | None = None,
    record_shapes: bool = False,
    profile_memory: bool = False,
    with_stack: bool = False,
) -> Profiler:
    """Return a context that profiles its body on each rank, and writes one trace of all ranks.

    Effects: ambient, collective. Its begin and end are collective. The file opens in
    https://ui.perfetto.dev, one process per rank, with the spans data, forward, backward,
    communication, optimizer, checkpoint and evaluation. Nothing is patched: models of `wrap`,
    loaders of `shard` and others name their ranges while the profile is open, PyTorch names the
    others. If the body raises, each rank writes its trace into the folder `path + ".ranks"` only.

    Args:
        ctx: The context.
        path: The file, compressed if it ends in `.gz`. None is `profile.json.gz` in
            `ctx.config.run_dir`. The ranks write into a folder beside it, which all nodes must
            have, and which is removed in the end.
        schedule: Which steps are recorded, from `torch.profiler.schedule`. None records all.
        ranks: The ranks that are profiled, equal on all ranks; None is all of them.
        record_shapes: Whether to record the shapes of arguments, as in `torch.profiler.profile`.
        profile_memory: Whether to record allocations.
        with_stack: Whether to record the lines of Python.

    Returns:
        The profiler. Call `profiler.step()` after each step; `profiler.summary` has the seconds of
        each span and rank afterwards.

    Raises:
        ConfigError: An argument is invalid, a profile is open in this process, two ranks are in one
            process, or a rank cannot write. On all ranks.

    Examples:
        >>> import tempfile
        >>> from faccel.testing import fake_context
        >>> path = tempfile.mkdtemp() + "/profile.json.gz"
        >>> with profile(fake_context(0, 1), path=path) as profiler:
        ...     torch.ones(2, requires_grad=True).sum().backward()
        ...     profiler.step()
        >>> profiler.summary.seconds[0]["backward"] > 0, profiler.summary.num_steps
        (True, 1)
    """
    require_context(ctx, "with faccel.tracking.profile(ctx) as profiler:")
    if path is None:
        path = Path(ctx.config.run_dir, "profile.json.gz")
    # Absolute, because the script may change its folder before the end.
    file = Path(local_path("path", path)).absolute()
    if file.is_dir():
        raise ConfigError(
            "`path` must be a file",
            got=f"the folder {short_text(str(path))}",
            fix=f'write `path="{short_text(str(path))}/profile.json.gz"`',
        )
    profiled = _checked_ranks(ranks, ctx)
    _check_schedule(schedule)
    torch_profile = None
    if ctx.rank in profiled:
        torch_profile = _torch_profile(
            ctx,
            schedule=schedule or _record_all,
            record_shapes=record_shapes,
            profile_memory=profile_memory,
            with_stack=with_stack,
        )
    return Profiler(ctx, file, torch_profile, profiled)


def _torch_profile(ctx: DistContext, **options: Any) -> TorchProfile:
    # Imported here: it takes tens of milliseconds.
    from torch.profiler import ProfilerActivity, supported_activities
    from torch.profiler import profile as torch_profile

    activities = {ProfilerActivity.CPU}
    if not is_host(ctx.device):
        activities = supported_activities()
    return torch_profile(activities=activities, **options)


def _record_all(_step: int) -> ProfilerAction:
    from torch.profiler import ProfilerAction

    # Also without a schedule PyTorch marks the steps, if it gets a function.
    return ProfilerAction.RECORD


def _check_schedule(schedule: object) -> None:
    if schedule is None:
        return
    from torch.profiler import ProfilerAction

    if not callable(schedule) or not isinstance(schedule(0), ProfilerAction):
        raise ConfigError(
            "`schedule` must be a schedule of torch.profiler",
            got=short_repr(schedule),
            fix=_FIX_SCHEDULE,
        )


def _checked_ranks(ranks: Sequence[int] | None, ctx: DistContext) -> list[int]:
    if ranks is None:
        return list(range(ctx.world_size))
    fix = "write `ranks=(0,)`"
    if isinstance(ranks, str) or not hasattr(ranks, "__iter__"):
        raise ConfigError("`ranks` must be a list of ranks", got=short_repr(ranks), fix=fix)
    ranks = list(ranks)
    for rank in ranks:
        integer("ranks", rank, at_least=0)
        if rank >= ctx.world_size:
            raise ConfigError(
                "`ranks` must be ranks of the world",
                got=f"{rank} of {ctx.world_size} ranks",
                fix=fix,
            )
    return sorted(set(ranks))
