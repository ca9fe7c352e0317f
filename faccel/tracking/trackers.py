"""Experiment trackers: rank 0 opens and closes those of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from faccel.checks import instance_of, local_path, one_of
from faccel.context import DistContext, require_context
from faccel.effects import AMBIENT, effectful, updates
from faccel.errors import ConfigError, FaccelError, short_repr, short_text
from faccel.tracking.run_file import write_run_file
from faccel.tracking.service import check_options, keyword_names, takes_any_keyword
from faccel.tracking.tracker import Tracker, Trackers, require_trackers
from faccel.tracking.tracker_table import TRACKERS, load_tracker
from faccel.tracking.values import run_config

_Options = Mapping[str, Mapping[str, Any]]


@effectful(AMBIENT)
def init_trackers(
    run: str,
    ctx: DistContext,
    *,
    trackers: Sequence[str | Tracker] = ("jsonl",),
    config: object = None,
    options: _Options | None = None,
) -> Trackers:
    """Start to record a run in the folder `ctx.config.run_dir / run`.

    Effects: ambient. Rank 0 creates the folder and opens the trackers. A run that exists continues,
    also with the services: the folder has the identities of their runs.

    Args:
        run: Name of the run.
        ctx: The context.
        trackers: Names such as `"jsonl"`, `"csv"`, `"tensorboard"` or `"wandb"`, or a `Tracker`.
        config: What to store about the run: a mapping, a dataclass or attrs record, a `Namespace`
            of argparse, or another object with attributes.
        options: Arguments of trackers by name: for `"wandb"` those of `wandb.init`, as in
            `{"wandb": {"project": "p"}}`.

    Returns:
        The trackers, for `log`, `log_images`, `finish` and others.

    Raises:
        ConfigError: A tracker is unknown, not installed or named twice, an option is unknown,
            `config` has no fields, `run` is a URL, or its folder cannot be created or belongs to
            another run of the service.

    Examples:
        >>> import tempfile
        >>> from faccel.testing import fake_context
        >>> from faccel.tracking import log
        >>> ctx = fake_context(0, 1, config={"run_dir": tempfile.mkdtemp()})
        >>> trackers = init_trackers("a", ctx, config={"lr": 0.1})
        >>> log({"loss": 2.5}, trackers, step=1)
        >>> finish(trackers)
    """
    require_context(ctx, "faccel.tracking.init_trackers(run, ctx)")
    # Every rank raises on a wrong argument, although only rank 0 records.
    local_path("run", run)
    by_name = _named_trackers(trackers)
    options_by_name = _options_of(by_name, options)
    fields = run_config(config)
    names = tuple(by_name)
    if not ctx.is_main:
        return Trackers(names=names)
    folder = _new_folder(Path(ctx.config.run_dir) / run)
    write_run_file(folder, ctx, config=fields)
    opened: list[tuple[str, Tracker, object]] = []
    for name, tracker in by_name.items():
        try:
            opened.append((name, tracker, tracker.open(folder, fields, **options_by_name[name])))
        except FaccelError:  # a requested tracker is not installed, or an option is unknown
            _close_all(opened)
            raise
        except Exception as error:
            # A service that is unreachable must not stop the training. The other trackers open.
            Trackers().report_failure(f"the tracker `{name}`", error, _offline_hint(name))
    return Trackers(opened, names)


def _close_all(opened: Sequence[tuple[str, Tracker, object]]) -> None:
    # Threads and processes of services would outlive the error.
    finish(Trackers(opened))


def _offline_hint(name: str) -> str:
    row = TRACKERS.get(name)
    if row is None or not row.offline:
        return ""
    return f". To record without network or account, pass `{row.offline}`"


def _new_folder(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # read-only, full, or a file is in the way
        raise ConfigError(
            "the folder of the run cannot be created in `run_dir`",
            got=f"{short_text(str(folder))}: {error.strerror}",
            fix='name a folder in a writable place, as in `run_dir="/tmp/runs"`',
        ) from error
    return folder


def _named_trackers(trackers: Sequence[str | Tracker]) -> dict[str, Tracker]:
    """Return the trackers by name; a custom one without a name has its position."""
    fix = 'write `trackers=("jsonl",)`'
    # A str is a sequence of letters.
    if isinstance(trackers, str):
        raise ConfigError(
            "`trackers` must be a list of trackers", got=short_repr(trackers), fix=fix
        )
    by_name: dict[str, Tracker] = {}
    for index, tracker in enumerate(trackers):
        if isinstance(tracker, Tracker):
            name = tracker.name or f"trackers[{index}]"
        else:
            one_of("trackers", tracker, TRACKERS)
            name = tracker
            tracker = load_tracker(name)
        if name in by_name:  # it would write each value twice into one file
            raise ConfigError(f"`trackers` has `{name}` twice", got=short_repr(trackers), fix=fix)
        by_name[name] = tracker
    return by_name


def _options_of(
    by_name: Mapping[str, Tracker], options: _Options | None
) -> dict[str, dict[str, Any]]:
    """Return the options of each tracker.

    Options of services are checked where they open: their libraries are imported on rank 0 only.
    """
    checked: dict[str, dict[str, Any]] = {name: {} for name in by_name}
    fix = 'write `options={"wandb": {"project": "p"}}`'
    if options is None:
        return checked
    instance_of("options", options, Mapping, fix=fix)
    for name, arguments in options.items():
        one_of("options", name, checked)
        instance_of(f'options["{name}"]', arguments, Mapping, fix=fix)
        start = by_name[name].open
        if not takes_any_keyword(start):
            check_options(name, arguments, keyword_names(start)[2:])  # after folder and config
        checked[name] = dict(arguments)
    return checked


@effectful(AMBIENT)
def handle(name: str, trackers: Trackers) -> Any:
    """Return the run of a tracker's library on rank 0, such as that of `wandb.init`.

    Effects: ambient. It is the library's object: what is done with it is recorded at once.

    Args:
        name: Name of the tracker.
        trackers: From `init_trackers`.

    Returns:
        The object on rank 0, if the tracker has opened; None on the other ranks.

    Raises:
        ConfigError: Other trackers were requested, or `trackers` are not from `init_trackers`.

    Examples:
        >>> import tempfile
        >>> from faccel.testing import fake_context
        >>> ctx = fake_context(0, 1, config={"run_dir": tempfile.mkdtemp()})
        >>> trackers = init_trackers("a", ctx, trackers=("csv",))
        >>> _ = handle("csv", trackers).write("0,note,by hand")
        >>> finish(trackers)
    """
    require_trackers(trackers, f'handle("{short_text(name)}", trackers)')
    # `Trackers()` is what a script has that records nothing.
    if trackers.names:
        one_of("name", name, trackers.names)
    for opened_name, tracker, state in trackers.opened:
        if opened_name == name:
            return tracker.handle(state)
    return None


@effectful(AMBIENT, updates("trackers"))
def finish(trackers: Trackers) -> None:
    """End the recording. Afterwards everything is on disk.

    Effects: ambient, updates trackers.

    Examples:
        >>> finish(Trackers())
    """
    for name, tracker, state in trackers.opened:
        try:
            tracker.close(state)
        except Exception as error:
            trackers.report_failure(f"the tracker `{name}`", error)
