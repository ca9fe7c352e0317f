"""Agreement on a name for each start, through a store that keeps the entries of earlier starts."""

import random
import threading

import pytest
import torch.distributed as dist

from faccel.runtime.rendezvous import agree_on_name


def start(store, world_size, missing=(), timeout_s=600.0):
    """Start a world once; its ranks arrive in random order. Return the name or error of each."""
    names = {}

    def run(rank):
        # Not for synchronization: a random delay varies the order of arrival.
        threading.Event().wait(random.Random(rank * 7 + len(names)).random() * 0.05)
        try:
            names[rank] = agree_on_name(store, rank, world_size, timeout_s)
        except dist.DistNetworkError as error:
            names[rank] = error

    ranks = [rank for rank in range(world_size) if rank not in missing]
    threads = [threading.Thread(target=run, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return names


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_all_ranks_agree_on_a_new_name_at_every_start(world_size):
    store = dist.HashStore()
    all_names = set()
    for _ in range(8):
        names = set(start(store, world_size).values())
        assert len(names) == 1, names
        all_names |= names
    assert len(all_names) == 8


def test_the_error_lists_the_ranks_that_started():
    store = dist.HashStore()
    start(store, 3)
    names = start(store, 3, missing=[2], timeout_s=2)
    assert "2 of 3 ranks started: 0, 1" in str(names[0])
    names = start(dist.HashStore(), 2, missing=[0], timeout_s=0.2)
    assert "rank 0 did not start" in str(names[1])
