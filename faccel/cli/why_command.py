"""The command `faccel why RUN`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import attrs
import click

from faccel.cli.output import json_option, present
from faccel.errors import printable

if TYPE_CHECKING:
    from faccel.observe.snapshot import Snapshot, Stack
    from faccel.observe.verdict import Verdict

_EXIT_CODES = {"even": 0, "ended": 0, "slow": 3, "hung": 4, "broken": 5}
_INTERVAL_S = 0.005  # some ten moments in a step of 50 ms


@click.command()
@click.argument("run", type=click.Path())
@click.option(
    "--seconds",
    type=click.FloatRange(0.01, 60),
    default=1.0,
    show_default=True,
    help="How long the ranks are watched.",
)
@click.option("--stacks", is_flag=True, help="Also print the stacks, equal ones once.")
@json_option
def why(run: str, *, seconds: float, stacks: bool, as_json: bool) -> None:
    """Print why the run in the folder RUN does not move, or why it is slow.

    RUN is the folder of `faccel launch --run-dir RUN`. One sentence names rank, phase and line.
    The ranks of this node are asked through sockets that only the user of the run can open.

    The exit code is 0 if the run moves and no rank is slower than the others, or has ended; 3 if a
    rank is slow, 4 if the run hangs, 5 if a rank has failed, does not answer or is missing, 1 if
    there is no such run.
    """
    from faccel.observe.ask import ask
    from faccel.observe.verdict import verdict

    snapshots = ask(run, duration_s=seconds, interval_s=min(_INTERVAL_S, seconds / 4))
    result = verdict(snapshots)
    if as_json:
        present(_document(result, snapshots), (), as_json=True)
        sys.exit(_EXIT_CODES[result.kind])
    click.secho(printable(result.sentence), bold=True)  # plain in a pipe
    lines = list(result.evidence)
    # After the evidence, where a reader of the end gets it.
    if result.next_step:
        lines.append(f"To fix: {result.next_step}.")
    if stacks:
        lines += _stack_lines(snapshots)
    for line in lines:
        # Not a table: sentences are longer than a column.
        click.echo(printable(line))
    sys.exit(_EXIT_CODES[result.kind])


def _document(result: Verdict, snapshots: Sequence[Snapshot]) -> dict[str, object]:
    ranks: list[dict[str, object]] = []
    for snapshot in snapshots:
        stack: Stack = ()
        if snapshot.moments:
            stack = snapshot.moments[-1].stack
        ranks.append(
            {
                "rank": snapshot.rank,
                "status": snapshot.status,
                "reason": snapshot.reason,
                "host": snapshot.host,
                "pid": snapshot.pid,
                "coordinates": dict(snapshot.coordinates),
                "step": snapshot.step,
                "loader": snapshot.loader,
                "stack": _lines(stack),
                "threads": {name: _lines(stack) for name, stack in snapshot.threads.items()},
                "groups": {name: attrs.asdict(group) for name, group in snapshot.groups.items()},
            }
        )
    return {**attrs.asdict(result), "rank": result.rank, "snapshots": ranks}


def _stack_lines(snapshots: Sequence[Snapshot]) -> list[str]:
    """Return the last stack of each rank; ranks with equal stacks have one."""
    from faccel.observe.sentences import ranks_text

    by_rank = {snapshot.rank: snapshot for snapshot in snapshots}
    ranks_of: dict[tuple[str, ...], list[int]] = {}
    for snapshot in snapshots:
        if snapshot.moments:
            stack = tuple(_lines(snapshot.moments[-1].stack))
            ranks_of.setdefault(stack, []).append(snapshot.rank)
    lines: list[str] = []
    # The largest group first: it is usually the one that waits.
    for stack, ranks in sorted(ranks_of.items(), key=lambda item: -len(item[1])):
        lines += ["", f"{ranks_text(ranks, by_rank)}, innermost first:"]
        lines += [f"  {line}" for line in stack]
    return lines


def _lines(stack: Stack) -> list[str]:
    return [f"{frame.site} {frame.function}" for frame in stack]
