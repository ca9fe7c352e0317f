"""Work that ranks share: every item once, results in order, errors on all ranks."""

import pytest
import torch

from faccel.errors import ConfigError, DataError, FaccelError
from faccel.inference import share_work
from faccel.testing import fake_context, simulate


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("num_items", [0, 1, 5, 6])
@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_every_item_is_computed_once_and_results_are_in_order(world_size, num_items, batch_size):
    computed = []

    def fn(batch):
        computed.extend(batch)
        return [torch.tensor(item) ** 2 for item in batch]

    items = list(range(num_items))
    for results in simulate(
        lambda ctx: share_work(fn, items, ctx, batch_size=batch_size), world_size
    ):
        assert [int(result) for result in results] == [item**2 for item in items]
    assert sorted(computed) == items


def test_an_error_on_one_rank_reaches_all():
    def fn(ctx):
        with pytest.raises(FaccelError, match="ZeroDivisionError") as error:
            share_work(lambda batch: [1 / item for item in batch], [1, 0, 2], ctx)
        return str(error.value)

    for message in simulate(fn, 2):
        assert "run `fn` on its items" in message


def test_mistakes_are_named():
    ctx = fake_context(0, 1)
    with pytest.raises(DataError, match="0 results for 1 items"):
        share_work(lambda batch: [], [1], ctx)
    with pytest.raises(ConfigError, match="must be a sequence"):
        share_work(list, iter([1]), ctx)
    with pytest.raises(ConfigError, match="must be a sequence"):
        share_work(list, {0: 1}, ctx)
    with pytest.raises(ConfigError, match="`fn` must be a function"):
        share_work([1], list, ctx)
    with pytest.raises(ConfigError, match="batch_size"):
        share_work(list, [1], ctx, batch_size=0)

    def fn(ctx):
        with pytest.raises(ConfigError, match="full model on each rank"):
            share_work(list, [1], ctx)

    simulate(fn, 2, mesh="dp_shard=2")


@pytest.mark.parametrize("result", [{"input_ids": 1, "attention_mask": 2}, "ab", b"ab"])
def test_a_mapping_or_a_text_of_the_right_length_is_not_taken_for_results(result):
    def fn(ctx):
        with pytest.raises(DataError, match="one result for each item"):
            share_work(lambda batch: result, [1, 2, 3, 4], ctx, batch_size=2)

    simulate(fn, 2)


@pytest.mark.parametrize(("more_items", "larger_batch"), [(1, 0), (0, 1)])
def test_ranks_with_other_items_or_batches_are_named(more_items, larger_batch):
    def fn(ctx):
        items, batch_size = range(6 + more_items * ctx.rank), 1 + larger_batch * ctx.rank
        with pytest.raises(DataError, match="differ between ranks") as error:
            share_work(list, items, ctx, batch_size=batch_size)
        return error.value.got

    expected = f"rank 0: 6 items, batch_size=1; rank 1: {6 + more_items} items, "
    assert simulate(fn, 2) == (f"{expected}batch_size={1 + larger_batch}",) * 2
