"""Codec of `per_rank`: a value of which each rank stores and loads its part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import attrs

from faccel.checkpoint.codec import Codec, Decoder, Encoder, Node, Restore, kind_of, mismatch
from faccel.checkpoint.tensor_names import child_name
from faccel.errors import CheckpointError
from faccel.tree import Tree


@attrs.frozen(eq=False)
class PerRank:
    """A value that differs between ranks; `per_rank` returns it.

    Args:
        value: The value of this rank.
    """

    value: Tree


def per_rank(value: Tree) -> PerRank:
    """Mark a value of a state that differs between ranks: `save` stores it for each rank.

    Effects: pure. Of an unmarked value, `save` stores rank 0's. `load` returns a `PerRank`, too,
    whose `value` is this rank's; objects with `load_state_dict` are updated in place. It
    needs a world of the size that saved it.

    Args:
        value: What a state may contain, except sharded tensors: a replay buffer, a statistic, ...

    Examples:
        >>> import tempfile
        >>> import faccel
        >>> from faccel.testing import simulate
        >>> def run(ctx, path):
        ...     state = {"seen": faccel.checkpoint.per_rank([ctx.rank, 10 * ctx.rank])}
        ...     faccel.save(state, path, ctx, step=1)
        ...     return faccel.load({"seen": None}, path, ctx)["seen"].value
        >>> with tempfile.TemporaryDirectory() as path:
        ...     simulate(run, 2, path)
        ([0, 0], [1, 10])
    """
    return PerRank(value)


def _is_per_rank(value: object) -> bool:
    return isinstance(value, PerRank)


def _rank_path(path: str, rank: int) -> str:
    return child_name(path, f"rank-{rank:05d}")


def _encode_per_rank(value: PerRank, path: str, encoder: Encoder) -> Node:
    if encoder.is_per_rank:
        raise CheckpointError(
            f"`{path}` is marked twice",
            got="`per_rank` inside of `per_rank`",
            fix="mark the outer value only",
        )
    encoder.is_per_rank = True
    try:
        node = encoder.encode(value.value, _rank_path(path, encoder.ctx.rank))
    finally:
        encoder.is_per_rank = False
    encoder.per_rank[path] = node
    # The nodes of the other ranks are added to the list when all ranks have sent theirs.
    nodes: list[Node] = [None] * encoder.ctx.world_size
    encoder.per_rank_lists[path] = nodes
    return {"!": "per_rank", "v": nodes}


def _decode_per_rank(node: Node, target: Tree, path: str, decoder: Decoder) -> Restore:
    nodes: Sequence[Node] = node["v"]
    world_size = decoder.ctx.world_size
    if len(nodes) != world_size:
        raise mismatch(
            path,
            f"values of {len(nodes)} ranks in the checkpoint, {world_size} ranks now",
            f"load it with {len(nodes)} processes, or leave it out",
        )
    inner = target
    if isinstance(target, PerRank):
        inner = target.value
    rank = decoder.ctx.rank
    restore = decoder.decode(nodes[rank], inner, _rank_path(path, rank))
    return lambda: PerRank(restore())


def _decode_unmarked(node: Node, target: Tree, path: str, decoder: Decoder) -> Restore:
    """Plan to restore a value that was saved without a mark: rank 0's, on every rank."""
    restore = decoder.decode(node, target.value, path)
    return lambda: PerRank(restore())


PER_RANK = Codec(
    ("per_rank",),
    _is_per_rank,
    _encode_per_rank,
    _decode_per_rank,
    decode_other=_decode_unmarked,
)


def key_paths(node: Node, path: str = "") -> list[str]:
    """Return the path of each key of each mapping, record and model in a node, in order.

    Effects: pure. Without those of values that are marked with `per_rank`, and of optimizers.

    Examples:
        >>> key_paths({"a": {"b": 1}, "c": [{"d": 2}]})
        ['a', 'a/b', 'c', 'c/0/d']
    """
    kind = kind_of(node)
    if kind in ("module", "stateful", "record", "tensordict"):
        node = node["v"]
        if kind == "stateful":
            return key_paths(node, path)
    elif kind in ("tuple", "list"):
        items = node["v"] if isinstance(node, dict) else node
        paths: list[str] = []
        for index, item in enumerate(items):
            paths += key_paths(item, child_name(path, str(index)))
        return paths
    elif kind not in ("dict", "OrderedDict"):
        return []
    return _paths_of_mapping(node, path)


def _paths_of_mapping(node: Mapping[str, Node], path: str) -> list[str]:
    children = dict(node)
    if "!" in node:  # keys that are no strings
        keys = [str(key) for key in node["k"]]
        children = dict(zip(keys, node["v"], strict=True))
    paths: list[str] = []
    for key in sorted(children):
        child_path = child_name(path, key)
        paths.append(child_path)
        paths += key_paths(children[key], child_path)
    return paths
