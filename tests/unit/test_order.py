"""The order of an epoch: permutations, their statistics, and every small case of `ShardPlan`."""

import functools
import itertools
import math

import numpy as np
import pytest
from torch.utils.data import BatchSampler

from faccel.data.order import SMALL, Cursor, Order, ShardPlan, permute
from faccel.errors import DataError

TAILS = ("pad", "full", "drop", "uneven")


def z_score(statistic, freedom):
    """How many standard deviations a chi-square statistic lies from its mean."""
    return (statistic - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize(
    "n", [1, 2, 3, 5, 16, 100, 1000, SMALL - 1, SMALL, SMALL + 1, 100_003, 1_000_000]
)
def test_an_order_is_a_permutation(n):
    order = permute(np.arange(n), n, seed=3, epoch=1)
    assert np.array_equal(np.sort(order), np.arange(n))


@pytest.mark.parametrize("n", [5, 1000, SMALL + 7, 10**12])
def test_the_sample_at_a_position_does_not_depend_on_the_other_positions(n):
    positions = np.array([0, 1, n // 2, n - 1])
    together = permute(positions, n, 0, 0)
    assert [int(permute(np.array([p]), n, 0, 0)[0]) for p in positions] == together.tolist()


def test_orders_differ_between_seeds_and_epochs():
    orders = [
        tuple(permute(np.arange(50), 50, s, e)) for s, e in itertools.product(range(20), range(20))
    ]
    assert len(set(orders)) == 400


@pytest.mark.parametrize(
    ("n", "epochs"), [(2, 4000), (5, 4000), (16, 4000), (100, 2000), (1000, 300), (10**5, 6)]
)
def test_positions_are_uniform(n, epochs):
    buckets = min(n, 50)  # which divides n
    counts = np.zeros((buckets, buckets))
    where = np.arange(n) * buckets // n
    for epoch in range(epochs):
        order = permute(np.arange(n), n, seed=11, epoch=epoch)
        np.add.at(counts, (where, order * buckets // n), 1)
    expected = epochs * n / buckets**2
    # Rows and columns of a permutation matrix have fixed sums: (buckets - 1)^2 degrees of freedom,
    # and a variance that is n / (n - 1) larger.
    statistic = (np.square(counts - expected) / expected).sum() * (n - 1) / n
    assert abs(z_score(statistic, (buckets - 1) ** 2)) < 5


@pytest.mark.parametrize(
    ("n", "epochs"), [(5, 4000), (16, 4000), (100, 2000), (1000, 300), (10**5, 6)]
)
def test_neighbouring_pairs_are_uniform(n, epochs):
    buckets = min(n - 1, 100)
    counts = np.zeros(buckets)
    followers = 0
    for epoch in range(epochs):
        order = permute(np.arange(n), n, seed=5, epoch=epoch)
        steps = np.diff(order) % n  # uniform on 1 ... n-1 for a random permutation
        followers += int((steps == 1).sum())
        counts += np.bincount((steps - 1) * buckets // (n - 1), minlength=buckets)
    weights = np.bincount(np.arange(n - 1) * buckets // (n - 1), minlength=buckets) / (n - 1)
    expected = weights * counts.sum()
    assert abs(z_score((np.square(counts - expected) / expected).sum(), buckets - 1)) < 5
    assert abs(followers - epochs) < 5 * math.sqrt(
        epochs
    )  # "the next sample follows": once per epoch on average


def rows(plan, start=0):
    order = Order(plan.num_samples, 0, 0, shuffle=False)
    return [row.tolist() for row in plan.batches(order, start)]


@pytest.mark.parametrize("split", [False, True])
def test_the_last_step_equals_accelerates(split):
    """`tail="full"` on several processes, `"pad"` on one."""
    data_loader = pytest.importorskip("accelerate.data_loader")
    for n, b, w in itertools.product(range(1, 20), range(1, 4), range(2, 5)):
        # With `split_batches`, the batch size counts the rows of all processes.
        sampler = BatchSampler(range(n), b * w if split else b, drop_last=False)
        for rank in range(w):
            shard = data_loader.BatchSamplerShard(sampler, w, rank, split_batches=split)
            assert rows(ShardPlan(n, b, rank, w, "full")) == list(shard), (n, b, rank, w)
    for n, b in itertools.product(range(1, 20), range(1, 4)):
        # Accelerate leaves a loader of one process as it is.
        assert rows(ShardPlan(n, b, 0, 1, "pad")) == list(BatchSampler(range(n), b, False))


@functools.cache
def steps_in_order(n, b, w, tail, start=0):
    """The valid rows of each step, over the ranks in order; and each step's cursor."""
    plans = [ShardPlan(n, b, r, w, tail) for r in range(w)]
    read = [rows(plan, start) for plan in plans]
    steps = []
    for s in range(max((len(r) for r in read), default=0)):
        valid = [
            x
            for p, r in zip(plans, read, strict=True)
            if s < len(r)
            for x in r[s][: p.num_valid(start, s)]
        ]
        steps.append((valid, plans[0].cursor(0, start, s)))
    return read, steps


def check_rows_and_repeats(n, b, w, tail, read):
    """The rows of each step are divided evenly, and repeats come from the start of the order."""
    num_rows = n % (b * w)
    if tail == "drop" or not num_rows:
        return
    last = [r[n // (b * w)] if len(r) > n // (b * w) else [] for r in read]
    lengths = [len(row) for row in last]
    repeats = sum(lengths) - num_rows
    if tail == "uneven":
        assert repeats == 0
        assert max(lengths) - min(lengths) <= 1
    if tail == "pad":
        assert set(lengths) == {-(-num_rows // w)}
        assert 0 <= repeats < w
    plans = [ShardPlan(n, b, r, w, tail) for r in range(w)]
    valid = [plan.num_valid(0, n // (b * w)) for plan in plans]
    assert sum(valid) == num_rows
    assert tail == "full" or max(valid) - min(valid) <= 1
    repeated = [x for row, count in zip(last, valid, strict=True) for x in row[count:]]
    assert repeated == [i % n for i in range(repeats)]


@pytest.mark.slow
def test_every_small_domain_is_read_exactly_once_and_resumed_on_any_world_size():
    for n, b, w, tail in itertools.product(range(40), range(1, 6), range(1, 9), TAILS):
        read, steps = steps_in_order(n, b, w, tail)
        expected = list(range(n // (b * w) * b * w if tail == "drop" else n))
        assert [x for valid, _ in steps for x in valid] == expected
        lengths = {len(r) for r in read}
        assert len(lengths) == 1 or tail == "uneven"
        if tail in ("full", "drop"):
            assert all(len(row) == b for r in read for row in r)
        check_rows_and_repeats(n, b, w, tail, read)
        seen = []
        for s, (valid, cursor) in enumerate(steps):
            seen += valid
            if s + 1 == len(steps):
                assert cursor == Cursor(1, 0)
                continue
            assert cursor == Cursor(0, len(seen))
            for other in range(1, 9):
                _, others = steps_in_order(n, b, other, tail, cursor.samples_consumed)
                resumed = [x for valid, _ in others for x in valid]
                left = n - len(seen)
                dropped = left % (b * other) if tail == "drop" else 0
                assert seen + resumed == list(range(n - dropped)), (n, b, w, tail, s, other)


def test_padding_wraps_around_repeatedly():
    assert [rows(ShardPlan(2, 3, r, 2, "full")) for r in range(2)] == [[[0, 1, 0]], [[1, 0, 1]]]
    assert [rows(ShardPlan(1, 3, r, 4, "pad")) for r in range(4)] == [[[0]]] * 4


def test_the_last_step_is_divided_evenly():
    def last(n, b, w, tail):
        return [rows(ShardPlan(n, b, r, w, tail))[-1:] for r in range(w)]

    assert last(10, 4, 1, "pad") == [[[8, 9]]]
    assert last(3, 8, 1, "pad") == [[[0, 1, 2]]]
    assert last(10, 4, 2, "pad") == [[[8]], [[9]]]
    assert last(13, 4, 2, "pad") == [[[8, 9, 10]], [[11, 12, 0]]]
    assert last(6, 2, 4, "pad") == [[[0, 1]], [[2, 3]], [[4, 0]], [[5, 1]]]
    assert last(6, 2, 4, "uneven") == [[[0, 1]], [[2, 3]], [[4]], [[5]]]
    assert last(2, 2, 4, "uneven") == [[[0]], [[1]], [], []]
    assert last(10, 4, 2, "full") == [[[8, 9, 0, 1]], [[2, 3, 4, 5]]]


def test_ranks_with_repeats_only_have_different_positions():
    """Positions seed random augmentation."""
    for n, b, w, tail in itertools.product(range(1, 30), range(1, 4), range(1, 6), TAILS):
        plans = [ShardPlan(n, b, r, w, tail) for r in range(w)]
        first = [plan.first_position(0, s) for plan in plans for s in range(plan.num_steps(0))]
        assert len(set(first)) == len(first)
        for plan in plans:
            for s, row in enumerate(rows(plan)):
                assert not plan.num_valid(0, s) or plan.first_position(0, s) == row[0]


def test_an_empty_dataset_has_no_steps():
    for tail in TAILS:
        assert rows(ShardPlan(0, 4, 1, 2, tail)) == []


def test_a_cursor_counts_from_zero():
    with pytest.raises(DataError):
        Cursor(0, -1)
