"""`SaveRequest`: the arguments of `save`, which ranks compare before anything is written."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from faccel.errors import CheckpointError, short_repr


@attrs.frozen
class SaveRequest:
    """Arguments of `save` that must be equal on all ranks.

    Args:
        path: The directory of checkpoints, absolute.
        step: See `save`.
        overwrite: See `save`.
        background: See `save`.
        trained_only: See `save`.
    """

    path: str
    step: int
    overwrite: bool
    background: bool
    trained_only: bool


def check_equal_requests(requests: Sequence[SaveRequest]) -> None:
    """Raise if ranks have called `save` with different arguments.

    Effects: pure.

    Args:
        requests: That of each rank.

    Raises:
        CheckpointError: An argument differs; names it, two ranks and their values.
    """
    first = attrs.asdict(requests[0])
    for rank, request in enumerate(requests):
        for name, value in attrs.asdict(request).items():
            if value != first[name]:
                raise CheckpointError(
                    f"`{name}` differs between ranks",
                    got=f"rank 0: {short_repr(first[name])}, rank {rank}: {short_repr(value)}",
                    fix="decide on one rank, and send the decision to the others "
                    "with `faccel.agree` or `faccel.broadcast_objects`",
                )
