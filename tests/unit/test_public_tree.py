"""The public functions of `faccel.tree`: nested values on a device, and their number of rows."""

import collections

import attrs
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import faccel
from faccel.errors import ConfigError, TreeError
from faccel.testing import fake_context, simulate
from faccel.tree import find_batch_size, flatten, map_leaves, to_device

Pair = collections.namedtuple("Pair", ["x", "y"])


@attrs.frozen
class Record:
    x: torch.Tensor
    name: str


class Text(dict):
    """A mapping that moves itself in place, as a `BatchEncoding` of transformers."""

    def to(self, device, non_blocking=False):
        raise AssertionError("in place")


X = torch.arange(6.0).reshape(3, 2)
TREES = {
    "tensor": X,
    "dict": {"a": X, "b": {"c": [X, "text", 3, None]}},
    "named tuple": Pair(X, (X,)),
    "record": Record(X, "a"),
    "mapping with a method": Text(ids=X, text="a"),
    "array": {"x": X, "array": np.ones(3)},
}


@pytest.mark.parametrize("kind", TREES)
def test_to_device_returns_the_same_structure_and_leaves_its_argument(kind):
    tree = TREES[kind]
    moved = to_device(tree, "meta")
    assert type(moved) is type(tree)
    before, after = flatten(tree)[0], flatten(moved)[0]
    for old, new in zip(before, after, strict=True):
        if isinstance(old, torch.Tensor):
            assert (new.device.type, new.shape, new.dtype) == ("meta", old.shape, old.dtype)
            assert old.device.type == "cpu"
        else:
            assert new is old
    # Nothing is copied to where it is already.
    assert all(x is y for x, y in zip(before, flatten(to_device(tree, "cpu"))[0], strict=True))


def test_to_device_uses_the_method_of_what_is_no_mapping():
    packed = pack_sequence([torch.ones(3, 2), torch.ones(1, 2)])
    moved = to_device([packed], torch.device("meta"), non_blocking=True)[0]
    assert moved.data.device.type == "meta"
    assert moved.batch_sizes.device.type == "cpu"  # as PyTorch requires
    tensordict = pytest.importorskip("tensordict")
    nested = {"t": tensordict.TensorDict({"x": X}, batch_size=[3])}
    assert to_device(nested, "meta")["t"].device == torch.device("meta")


@pytest.mark.parametrize("kind", TREES)
def test_find_batch_size_is_the_length_along_dim_0(kind):
    assert find_batch_size(TREES[kind]) == 3


def test_a_batch_without_one_number_of_rows_is_an_error_that_names_the_leaf():
    with pytest.raises(TreeError, match=r"\['y'\]") as error:
        find_batch_size({"x": torch.ones(3), "y": torch.ones(2)})
    assert "has 3" in error.value.problem
    for empty in ({}, [1, "a"], {"x": torch.tensor(1.0)}):
        with pytest.raises(TreeError, match="without a tensor"):
            find_batch_size(empty)


def test_the_namespace_has_three_names():
    assert faccel.tree.__all__ == ["find_batch_size", "map_leaves", "to_device"]
    assert faccel.tree.map_leaves is map_leaves
    assert len(faccel.__all__) <= 55


class Recorded(nn.Linear):
    """A layer that counts how often it is moved: to the only device that there is here."""

    num_moves = 0

    def to(self, *args, **kwargs):
        self.num_moves += 1
        return super().to(*args, **kwargs)


@pytest.mark.parametrize("configured", [True, False])
@pytest.mark.parametrize("device_placement", [None, True, False])
def test_device_placement_of_one_call_is_stronger_than_the_configuration(
    configured, device_placement
):
    ctx = fake_context(0, 1, config={"device_placement": configured})
    model = faccel.wrap(Recorded(2, 1), ctx, device_placement=device_placement)
    is_moved = configured if device_placement is None else device_placement
    assert model.module.num_moves == int(is_moved)
    # A rewrap places new parameters as the `wrap` did.
    model = faccel.rewrap(model, ctx)
    assert model.module.num_moves == 2 * int(is_moved)


def test_a_model_that_is_not_placed_stays_on_another_device():
    ctx = attrs.evolve(fake_context(0, 1), device=torch.device("meta"))
    model = faccel.wrap(nn.Linear(2, 1), ctx, device_placement=False)
    assert model.module.weight.device.type == "cpu"


def test_replicas_take_device_placement():
    def fn(ctx):
        model = faccel.wrap(nn.Linear(2, 1), ctx, device_placement=False)
        return model(torch.ones(1, 2)).item()

    first, second = simulate(fn, 2)
    assert first == second


def test_a_mesh_that_shards_parameters_places_them_itself():
    with pytest.raises(ConfigError, match="this mesh shards parameters"):
        simulate(lambda ctx: faccel.wrap(nn.Linear(2, 2), ctx, device_placement=False), 2,
                 mesh="dp_shard=2")  # fmt: skip
