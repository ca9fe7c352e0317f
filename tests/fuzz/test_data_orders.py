"""Every sample exactly once per epoch, for random worlds, batch sizes, tails and resumes."""

from collections import Counter

from torch.utils.data import DataLoader

import faccel
from faccel.errors import DataError
from faccel.testing import fake_context
from tests.fuzz.runs import Report, cases


def options_of(draw):
    """Return a dataset's length and how it is read; small numbers, so that edges are frequent."""
    return {
        "num_samples": draw.choice([1, 2, 3, 5, 8, 13, 21, 64, 100, draw.randrange(1, 200)]),
        "batch_size": draw.choice([1, 2, 3, 4, 7, 8, 16]),
        "shuffle": draw.random() < 0.7,
        "tail": draw.choice(["pad", "full", "drop", "uneven"]),
        "seed": draw.choice([0, 1, 2**63 - 1, draw.randrange(2**63)]),
    }


def sharded(options, rank, world_size):
    loader = DataLoader(
        range(options["num_samples"]),
        batch_size=options["batch_size"],
        shuffle=options["shuffle"],
    )
    ctx = fake_context(rank, world_size)
    return faccel.shard(loader, ctx, tail=options["tail"], seed=options["seed"])


def steps_of(options, world_size, cursor, num_steps):
    """Read at most `num_steps` steps of an epoch; return the samples, the rows, and the cursor."""
    samples, rows_by_step, cursors = [], {}, {}
    for rank in range(world_size):
        for number, batch in enumerate(
            faccel.batches(sharded(options, rank, world_size).resume(cursor))
        ):
            if number >= num_steps:
                break
            rows = batch.data.tolist()
            assert 0 <= batch.num_valid <= len(rows) <= options["batch_size"]
            samples += rows[: batch.num_valid]
            rows_by_step.setdefault(number, []).append(len(rows))
            cursors.setdefault(number, set()).add(
                (batch.cursor.epoch, batch.cursor.samples_consumed)
            )
            last = batch.cursor
    for places in cursors.values():
        assert len(places) == 1  # the same on every rank
    if not cursors:
        return samples, rows_by_step, None
    epoch, consumed = max(cursors[max(cursors)])
    return samples, rows_by_step, faccel.Cursor(epoch, consumed, of=last.of)


def check_rows(options, world_size, rows_by_step):
    """Compare the number of rows of each step with what its tail promises."""
    for number, rows in rows_by_step.items():
        is_full = rows == [options["batch_size"]] * world_size
        is_last = number == max(rows_by_step)
        if options["tail"] in ("drop", "full") or not is_last:
            assert is_full, (number, rows)
        if options["tail"] == "pad":
            assert len(rows) == world_size and len(set(rows)) == 1, (number, rows)
        if options["tail"] == "uneven":
            assert max(rows) - min(rows) <= 1, (number, rows)


def check_epoch(draw, options):
    """Read an epoch, interrupted at random steps and resumed on other worlds."""
    epoch = draw.choice([0, 0, 1, 7])
    cursor = faccel.Cursor(epoch)
    samples = []
    smallest_left = 1
    for _ in range(options["num_samples"] + 1):
        world_size = draw.choice([1, 2, 3, 4, 5, 8])
        num_steps = draw.choice([1, 1, 2, 3, 10**9])
        smallest_left = world_size * options["batch_size"]
        try:
            new, rows_by_step, after = steps_of(options, world_size, cursor, num_steps)
        except DataError:  # an epoch without any step
            assert options["tail"] == "drop" and options["num_samples"] < smallest_left
            assert not samples
            return
        check_rows(options, world_size, rows_by_step)
        samples += new
        if after is None or after.epoch > epoch:
            break
        cursor = after
    counts = Counter(samples)
    assert set(counts.values()) <= {1}, "a sample was read twice"
    assert set(counts) <= set(range(options["num_samples"]))
    num_missing = options["num_samples"] - len(counts)
    if options["tail"] == "drop":  # fewer than one step of the last world
        assert num_missing < smallest_left
    else:
        assert num_missing == 0, "a sample was not read"
    if not options["shuffle"]:
        assert sorted(samples) == list(range(len(samples)))  # the first ones, in every world


def test_every_sample_is_read_exactly_once_per_epoch():
    report = Report("data orders")
    for label, draw in cases("data_orders", 100):
        options = options_of(draw)
        try:
            check_epoch(draw, options)
            report.count(options["tail"])
        except Exception as error:
            report.count("wrong")
            report.fail(label, str(options), error)
    report.finish()
