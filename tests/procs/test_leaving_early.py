"""A rank that closes its connections must not end those that another rank still makes."""

import os
import time

import pytest
import torch.distributed as dist

from faccel.runtime import process_groups
from tests.ranks import run_ranks


def slow_on_rank_1(name):
    """Let a function that creates groups take until rank 0 has left, or half a second."""
    create_groups = getattr(process_groups, name)

    def create(*args, **options):
        groups = create_groups(*args, **options)
        if dist.get_rank() == 1:
            rank_status = process_groups.DEFAULT_GROUP._rank_status
            deadline = time.monotonic() + 0.5
            while time.monotonic() < deadline:
                assert not rank_status.has_any_left(), "rank 0 has left"
                time.sleep(0.02)
        return groups

    setattr(process_groups, name, create)


def slow_init():
    slow_on_rank_1("create_axis_groups")


def slow_mesh():
    slow_on_rank_1("create_device_mesh")


def work(ctx):
    return os.getpid()


def create_mesh(ctx):
    return str(ctx.mesh.device_mesh)


@pytest.mark.parametrize("debug", [False, True])
@pytest.mark.parametrize(("before", "fn"), [(slow_init, work), (slow_mesh, create_mesh)])
def test_a_rank_leaves_when_all_have_connected(before, fn, debug):
    assert len(run_ranks(fn, 2, before=before, debug=debug)) == 2
