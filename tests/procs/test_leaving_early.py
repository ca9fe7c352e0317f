"""A rank without work leaves at once; ranks that still connect must not lose their connection."""

import os
import time

import pytest

from faccel.runtime import process_groups
from tests.ranks import run_ranks


def connect_slowly():
    """Let rank 1 connect its last groups when rank 0 has left, or after a second."""
    create_groups = process_groups.create_axis_groups

    def create(*args, **options):
        if args[1] == 1:
            group = process_groups.DEFAULT_GROUP
            deadline = time.monotonic() + 1
            while time.monotonic() < deadline and not group._rank_status.has_any_left():
                time.sleep(0.02)
            assert not group._rank_status.has_any_left(), "rank 0 has left"
        return create_groups(*args, **options)

    process_groups.create_axis_groups = create


def work(ctx):
    return os.getpid()


@pytest.mark.parametrize("debug", [False, True])
def test_a_rank_leaves_when_all_have_connected(debug):
    first, second = run_ranks(work, 2, before=connect_slowly, debug=debug)
    assert first != second
