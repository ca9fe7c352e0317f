"""`faccel.tree`: containers, order of the leaves, and error messages."""

import collections
import dataclasses
import gc
import types
import weakref

import attrs
import pytest
import torch

from faccel.errors import TreeError
from faccel.tree import flatten, leaf_error, map_leaves, paths

Pair = collections.namedtuple("Pair", "a b")


@attrs.frozen
class Record:
    _hidden: int
    other: dict


@dataclasses.dataclass
class Data:
    x: int
    y: list


TREES = [
    3,
    {"b": 1, "a": [2, (3, 4)]},
    Pair(1, {"x": 2}),
    Record(1, {"z": 2, "y": 3}),
    Data(1, [2, 3]),
    collections.OrderedDict(z=1, a=2),
    collections.defaultdict(list, {"k": 1}),
    {1: "a", "b": 2},
    [],
    {},
    (),
]


@pytest.mark.parametrize("tree", TREES, ids=str)
def test_flatten_and_rebuild_is_the_identity(tree):
    leaves, rebuild = flatten(tree)
    again = rebuild(leaves)
    assert again == tree
    assert type(again) is type(tree)
    assert len(paths(tree)) == len(leaves)
    assert flatten(map_leaves(lambda x: (x,), tree))[0] == leaves or leaves == flatten(tree)[0]


def test_containers_that_are_leaves_stay_in_one_piece():
    tree = {"texts": ["a", "b"], "pair": (1, ["c", [2]])}
    leaves, rebuild = flatten(tree, is_leaf=lambda value: isinstance(value, list))
    assert leaves == [1, ["c", [2]], ["a", "b"]]
    assert rebuild([7, 8, 9]) == {"texts": 9, "pair": (7, 8)}
    assert flatten(tree, is_leaf=lambda value: True)[0] == [tree]


def test_a_mapping_that_cannot_be_changed_becomes_a_dict():
    tree = types.MappingProxyType({"b": 1, "a": (2,)})
    assert map_leaves(lambda x: x * 10, tree) == {"b": 10, "a": (20,)}
    assert list(map_leaves(lambda x: x, tree)) == ["b", "a"]


def test_dicts_are_flattened_in_sorted_order_and_rebuilt_in_the_original_order():
    leaves, rebuild = flatten({"b": 1, "a": 2})
    assert leaves == [2, 1]
    assert list(rebuild([0, 0])) == ["b", "a"]


def test_a_default_factory_is_kept():
    _, rebuild = flatten(collections.defaultdict(list, {"k": 1}))
    assert rebuild([2])["new"] == []


def test_a_rebuilt_tensordict_has_the_batch_size_of_its_leaves():
    from tensordict import TensorDict

    td = TensorDict({"x": torch.zeros(2, 3), "n": {"y": torch.zeros(2)}}, batch_size=[2])
    out = map_leaves(lambda t: torch.cat([t, t]), td)
    assert out.batch_size == (4,)
    assert out["n"].batch_size == (4,)


def test_an_error_names_the_path_type_and_shape():
    error = leaf_error({"a": [1, torch.zeros(2, 3)]}, 1, "no", "do")
    assert isinstance(error, TreeError)
    assert "['a'][1]" in error.got
    assert "(2, 3)" in error.got


def test_leaves_are_freed_without_a_garbage_collection():
    class Leaf:
        pass

    leaf = Leaf()
    reference = weakref.ref(leaf)
    gc.disable()
    try:
        leaves, rebuild = flatten({"a": [leaf]})
        rebuild(leaves)
        del leaf, leaves, rebuild
        assert reference() is None
    finally:
        gc.enable()
