"""A standard logger that logs on rank 0, on all ranks in order, once, and to a file per rank."""

from __future__ import annotations

import logging
import sys
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from faccel.context import DistContext, require_context
from faccel.effects import AMBIENT, effectful
from faccel.errors import ConfigError, short_text
from faccel.mesh import WORLD
from faccel.tracking.screen import above_bars
from faccel.tracking.values import json_text

_FORMATTER = logging.Formatter()


class _LinesFile:
    """One JSON object per record in the run folder, `logs/rank0.jsonl` for rank 0."""

    def __init__(self, ctx: DistContext) -> None:
        self._rank = ctx.rank
        path = Path(ctx.config.run_dir) / "logs" / f"rank{ctx.rank}.jsonl"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Buffered by lines: a killed run keeps all that it logged.
            self._file = path.open("a", encoding="utf-8", buffering=1)
        except OSError as error:  # read-only, full, or a file is in the way
            raise ConfigError(
                "the folder of the logs cannot be written in `run_dir`",
                got=f"{short_text(str(path))}: {error.strerror}",
                fix='name a folder in a writable place, as in `run_dir="/tmp/runs"`',
            ) from error
        # With the logger, or at exit: messages after the end of the context are written, too.
        self._close = weakref.finalize(self, _close, self._file)

    def write(self, record: logging.LogRecord, step: object) -> None:
        """Write a record. A message that cannot be formatted is written without its arguments."""
        if not self._close.alive:  # the process exits, or the disk was full
            return
        try:
            message = record.getMessage()
        # `logging` prints such an error and continues, too.
        except Exception:
            message = record.msg
        line = {
            "time": record.created,
            "rank": self._rank,
            "step": step,
            "level": record.levelname,
            "logger": record.name,
            "message": message,
        }
        # On most ranks the file is the only place that has it.
        if record.exc_info is not None:
            line["exception"] = _FORMATTER.formatException(record.exc_info)
        try:
            self._file.write(json_text(line) + "\n")
        except OSError as error:  # a full disk must not stop the training
            self._close()
            message = "the log `%s` failed, and is not continued: %r"
            logging.getLogger("faccel").error(message, self._file.name, error)


def _close(file: TextIO) -> None:
    # What a full disk has refused is tried again, and refused again.
    with suppress(OSError):
        file.close()


def _exc_info(value: Any) -> Any:
    """Return `exc_info=` of a call as in a record; None without an exception."""
    if isinstance(value, BaseException):
        return (type(value), value, value.__traceback__)
    if value and not isinstance(value, tuple):
        value = sys.exc_info()
    # `log.exception` outside of an `except`
    if not value or value[0] is None:
        return None
    return value


class RankLogger(logging.LoggerAdapter[logging.Logger]):
    """A standard logger that logs on rank 0 only, or on every rank with `every_rank=True`.

    Each record has the attributes `rank`, `world_size` and `step` (None by default), for a format.
    Without a context, they are None, and each process logs.
    """

    def __init__(
        self, logger: logging.Logger, ctx: DistContext | None, lines: _LinesFile | None = None
    ) -> None:
        super().__init__(logger, {})
        self.ctx = ctx
        self._lines = lines
        self._logged: set[int] = set()

    # Only this level is off in most loops, and `LoggerAdapter` takes three calls to find that out.
    def debug(self, msg: object, *args: object, **kwargs: Any) -> None:
        """Log as `logging.Logger.debug` does, with the options of `log`."""
        if kwargs or self.logger.isEnabledFor(logging.DEBUG):
            kwargs["stacklevel"] = kwargs.get("stacklevel", 1) + 1
            self.log(logging.DEBUG, msg, *args, **kwargs)

    # `Any` as in the method that it overrides
    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        """Log as `logging.Logger.log` does, with more options.

        `every_rank=True` logs on every rank, `in_order=True` one rank after the other, which is
        collective: call it on all ranks. `once=True` logs a message and its arguments once.
        `step=` is an attribute of the record. `ctx=` is the context of a logger without one.
        """
        ctx = kwargs.pop("ctx", self.ctx)
        in_order = kwargs.pop("in_order", False)
        is_enabled = self.logger.isEnabledFor(level)
        if not is_enabled and (ctx is None or not in_order):
            return
        kwargs["stacklevel"] = kwargs.get("stacklevel", 1) + 1  # the caller's line, not this one
        if ctx is None or not in_order:
            self._log_here(ctx, level, msg, args, kwargs)
            return
        kwargs["every_rank"] = True
        ctx.comm.begin_call("log in order")
        # Also for a level that this rank does not log: levels may differ between ranks.
        for rank in range(ctx.world_size):
            if rank == ctx.rank and is_enabled:
                self._log_here(ctx, level, msg, args, kwargs)
            ctx.comm.barrier(WORLD)

    def _log_here(
        self,
        ctx: DistContext | None,
        level: int,
        msg: object,
        args: tuple[object, ...],
        kwargs: dict[str, Any],
    ) -> None:
        every_rank = kwargs.pop("every_rank", False)
        once = kwargs.pop("once", False)
        step = kwargs.pop("step", None)
        # Before `msg` is formatted: most records of most ranks are not logged.
        is_printed = ctx is None or ctx.is_main or every_rank
        if not (is_printed or self._lines is not None):
            return
        if once and not self._is_new(level, msg, args):
            return
        if self._lines is not None:
            exc_info = _exc_info(kwargs.get("exc_info"))
            fields = (self.logger.name, level, "", 0, msg, args, exc_info)
            self._lines.write(self.logger.makeRecord(*fields), step)
        if not is_printed:
            return
        rank, world_size = None, None
        if ctx is not None:
            rank, world_size = ctx.rank, ctx.world_size
            if every_rank and world_size > 1:
                msg = f"[rank {rank}] {msg}"
        rank_fields = {"rank": rank, "world_size": world_size, "step": step}
        # None is the default of `logging`.
        kwargs["extra"] = {**rank_fields, **(kwargs.get("extra") or {})}
        kwargs["stacklevel"] += 1  # this method
        # Also of handlers that have had the terminal since before the bars were opened.
        with above_bars():
            self.logger.log(level, msg, *args, **kwargs)

    def _is_new(self, level: int, msg: object, args: tuple[object, ...]) -> bool:
        # As text: arguments need not be hashable, and must not be kept alive. All of it, because
        # messages may differ at the end of a long path.
        try:
            key = hash((level, str(msg), repr(args)))
        except Exception:  # `logging` prints what is wrong with the message, and continues
            return True
        if key in self._logged:
            return False
        self._logged.add(key)
        return True


@effectful(AMBIENT)
def get_logger(
    name: str, ctx: DistContext | None = None, *, json_lines: bool = False
) -> RankLogger:
    """Return a logger of the standard library that logs on rank 0 only.

    Effects: ambient. Calls `logging.getLogger(name)`; changes no level, handler or root logger.

    Args:
        name: Name of the logger, usually `__name__`.
        ctx: The context. Without one, for a logger at the top of a module, each process logs, and
            a call such as `log.info("loaded", ctx=ctx)` takes it.
        json_lines: Whether each rank also writes its records, also those that it does not print, to
            the file `ctx.config.run_dir / "logs" / "rank0.jsonl"` with the number of the rank.

    Returns:
        The logger. Its methods take `every_rank=`, `in_order=`, `once=`, `step=` and `ctx=`, too.
        `in_order=True` is collective.

    Raises:
        ConfigError: `json_lines` without a context, or the folder cannot be written.

    Examples:
        >>> from faccel.testing import fake_context
        >>> log = get_logger(__name__, fake_context(1, 2))
        >>> log.warning("not logged: this is rank 1", step=3)
    """
    lines = None
    if ctx is not None:
        require_context(ctx, "faccel.get_logger(name, ctx)")
        if json_lines:
            lines = _LinesFile(ctx)
    # Without a context there is no run folder.
    elif json_lines:
        raise ConfigError(
            "`json_lines` needs the run folder of a context",
            got="ctx=None",
            fix="write `faccel.get_logger(name, ctx, json_lines=True)` after `ctx = faccel.init()`",
        )
    return RankLogger(logging.getLogger(name), ctx, lines)
