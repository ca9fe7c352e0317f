"""State that differs between ranks: marked values come back on their rank, unequal keys raise."""

from collections import OrderedDict, deque

import pytest
import torch
from torch import nn

import faccel
from faccel.checkpoint import per_rank
from faccel.errors import CheckpointError
from faccel.testing import simulate
from tests.ranks import run_ranks


class Replay:
    """A buffer of samples; each rank has another number of them."""

    def __init__(self, samples=()):
        self.samples = deque(samples)

    def state_dict(self):
        return {"samples": list(self.samples), "sum": torch.tensor(self.samples).sum()}

    def load_state_dict(self, state):
        self.samples = deque(state["samples"])
        assert state["sum"] == sum(self.samples)


def state_of(rank, seed=0):
    torch.manual_seed(rank)
    return {
        "tensor": per_rank(torch.full((rank + 1, 2), float(rank + seed))),
        "nested": {"keys": per_rank({f"key {rank}": [seed] * rank, 3: None})},
        "replay": per_rank(Replay(range(rank + 2))),
        "net": per_rank(nn.Linear(rank + 1, 1)),
        "equal": 7 * rank,
    }


def save_and_load(ctx, path):
    state = state_of(ctx.rank, seed=5)
    faccel.save(state, path, ctx, step=1)
    targets = state_of(ctx.rank)
    targets["replay"] = per_rank(Replay())
    with torch.no_grad():
        targets["net"].value.weight.zero_()
    loaded = faccel.load(targets, path, ctx)
    assert torch.equal(loaded["tensor"].value, torch.full((ctx.rank + 1, 2), float(ctx.rank + 5)))
    assert loaded["nested"]["keys"].value == {f"key {ctx.rank}": [5] * ctx.rank, 3: None}
    assert loaded["replay"].value is targets["replay"].value
    assert list(loaded["replay"].value.samples) == list(range(ctx.rank + 2))
    assert torch.equal(targets["net"].value.weight, state["net"].value.weight)
    assert loaded["equal"] == 0  # unmarked: rank 0's
    # what was loaded is still marked, so that the next save is right
    faccel.save(loaded, path, ctx, step=2)
    again = faccel.load({"tensor": None}, path, ctx)["tensor"].value
    assert torch.equal(again, loaded["tensor"].value)
    return True


@pytest.mark.parametrize("mesh", ["dp_replicate=3", "dp_shard=2", "dp_replicate=1", "pp=2"])
def test_a_marked_value_comes_back_on_its_rank(tmp_path, mesh):
    world_size = faccel.MeshSpec.of(mesh).size
    assert all(simulate(save_and_load, world_size, str(tmp_path), mesh=mesh))


def test_marked_values_come_back_in_processes(tmp_path):
    assert run_ranks(save_and_load, 2, str(tmp_path)) == [True, True]


def test_a_marked_value_needs_the_world_size_that_saved_it(tmp_path):
    simulate(save_and_load, 2, str(tmp_path))

    def load(ctx):
        with pytest.raises(
            CheckpointError, match="values of 2 ranks in the checkpoint, 3 ranks now"
        ):
            faccel.load({"tensor": None}, tmp_path, ctx)
        return faccel.load({"equal": None}, tmp_path, ctx)["equal"]

    assert simulate(load, 3) == (0, 0, 0)


def test_a_value_that_was_saved_unmarked_loads_into_a_marked_one(tmp_path):
    def run(ctx):
        faccel.save({"x": [1, 2]}, tmp_path, ctx, step=1)
        return faccel.load({"x": per_rank([])}, tmp_path, ctx)["x"].value

    assert simulate(run, 2) == ([1, 2], [1, 2])


UNEQUAL = {
    "a metric": ({"loss": 1.0}, {"loss": 1.0, "accuracy": 2.0}, "`x/accuracy` only on rank 1"),
    "no key": ({"a": 1}, {"b": 1}, "`x/a` only on rank 0, `x/b` only on rank 1"),
    "a tensor": ({"a": torch.ones(1)}, {}, "`x/a` only on rank 0"),
    "numbers": ({1: 0, 2: 0}, {1: 0, 3: 0}, "`x/2` only on rank 0, `x/3` only on rank 1"),
    "in a list": ([{"a": 1}], [{"b": 1}], "`x/0/a` only on rank 0, `x/0/b` only on rank 1"),
    "ordered": (OrderedDict(a=1), OrderedDict(), "`x/a` only on rank 0"),
    "a model": (nn.Linear(1, 1), nn.Linear(1, 1, bias=False), "`x/bias` only on rank 0"),
    "an object": ({"deep": Replay([1])}, {"deep": nn.Linear(1, 1)}, "`x/deep/samples`"),
}


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("name", UNEQUAL)
def test_ranks_with_other_keys_raise_and_are_named(tmp_path, name, background):
    first, second, message = UNEQUAL[name]

    def run(ctx):
        value = second if ctx.rank == 1 else first
        with pytest.raises(CheckpointError, match="different keys") as caught:
            faccel.save({"x": value}, tmp_path, ctx, step=1, background=background)
        assert message in caught.value.got
        # the fix works
        faccel.save({"x": per_rank(value)}, tmp_path, ctx, step=1, background=background)
        return faccel.latest(tmp_path, ctx).step

    assert simulate(run, 3) == (1, 1, 1)


def test_a_value_that_is_marked_on_one_rank_only_raises(tmp_path):
    def run(ctx):
        value = per_rank(1) if ctx.rank else 1
        with pytest.raises(CheckpointError, match="`x` is marked with `per_rank` on some ranks"):
            faccel.save({"x": value}, tmp_path, ctx, step=1)

    simulate(run, 2)


def test_other_values_and_orders_of_keys_do_not_raise(tmp_path):
    def run(ctx):
        metrics = {"a": 1, "b": None, "history": [0] * ctx.rank}
        if ctx.rank:
            metrics = {key: metrics[key] for key in ("history", "b", "a")}
        faccel.save({"m": metrics}, tmp_path, ctx, step=1)
        return faccel.load({"m": {}}, tmp_path, ctx)["m"]

    assert simulate(run, 2) == ({"a": 1, "b": None, "history": []},) * 2


def test_a_sharded_tensor_and_a_mark_in_a_mark_raise(tmp_path):
    def run(ctx):
        model = faccel.wrap(nn.Linear(2, 2), ctx)
        for value, message in ((model, "remove"), ({"y": per_rank(1)}, "the outer value")):
            with pytest.raises(CheckpointError) as caught:
                faccel.save({"x": per_rank(value)}, tmp_path, ctx, step=1)
            assert message in caught.value.fix

    simulate(run, 2, mesh="dp_shard=2")
