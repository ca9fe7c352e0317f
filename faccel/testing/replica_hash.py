"""Replicas compared by hashes: one number per rank, so that a training loop can afford it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import attrs
import numpy as np
import torch
import xxhash
from torch.optim import Optimizer

from faccel.comm.objects import gather_json
from faccel.context import DistContext
from faccel.errors import TreeError, short_repr
from faccel.mesh import AXES, EXPERT_AXES, VIEWS, WORLD, MeshSpec
from faccel.random.hashing import mix
from faccel.training.grad_clip import is_unreduced
from faccel.training.model import WrappedModel
from faccel.training.tensor_hash import hash_tensor, mix_
from faccel.tree import Tree, flatten, is_dtensor, is_sharded, local_tensor, paths

# Leaves that are equal if their texts are.
_PLAIN = (type(None), bool, int, float, complex, str, bytes)
# Options of an optimizer that are compared. Others, such as functions, have no bits.
_OPTIONS = (*_PLAIN, tuple, torch.Tensor)


@attrs.frozen(eq=False)
class _Leaf:
    """One value of this rank, and the ranks that have a copy of it.

    Args:
        path: Its path in the tree.
        value: A tensor, of a sharded one this rank's shard; an array or a plain value.
        axes: Axes or views of the mesh. Ranks that differ in the index on one of them have copies.
    """

    path: str
    value: Tree
    axes: tuple[str, ...]


def check_replicas_by_hash(tree: Tree, ctx: DistContext, axis: str) -> None:
    """Raise on every rank of the axis if copies of a value differ in a bit.

    Collective: one all-reduce of one number, for which the host waits. Only where copies differ,
    the ranks exchange the hash of each leaf.

    Raises:
        AssertionError: Names the leaf and the ranks that differ from the majority.
    """
    leaves = list(_leaves(tree, ctx, axis))
    hashes = _hashes(leaves, ctx)
    # sum over ranks of c_r * h_r, modulo 2^64, where the c_r of ranks with copies have the sum 0:
    # it is 0 if the copies are equal, and else with a probability of about 2^-64. One sum compares
    # all leaves on all axes, and all ranks of the axis raise together.
    weights = [_weight(leaf, ctx) for leaf in leaves]
    total = (hashes * _int64(weights, ctx.device)).sum().view(1)
    ctx.comm.set_call_label("assert_replicated", total)
    if ctx.comm.all_reduce(total, "sum", axis).item() == 0:
        return
    _raise_difference(leaves, hashes.tolist(), ctx, axis)


def _hashes(leaves: Sequence[_Leaf], ctx: DistContext) -> torch.Tensor:
    """Return `int64[len(leaves)]`: hashes of the values, their types and their paths."""
    by_device: dict[torch.device, list[int]] = {}
    hashes: dict[int, torch.Tensor] = {}
    texts: list[int] = []
    for index, leaf in enumerate(leaves):
        texts.append(_hash_text(leaf))
        if isinstance(leaf.value, torch.Tensor):
            hashes[index] = hash_tensor(leaf.value)
            by_device.setdefault(leaf.value.device, []).append(index)
    result = _int64(texts, ctx.device)
    # One copy for each device: the `step` of an optimizer is on the CPU.
    for indices in by_device.values():
        values = torch.stack([hashes[index] for index in indices]).to(ctx.device)
        result[torch.tensor(indices, device=ctx.device)] ^= mix_(values)
    return mix_(result)


def _hash_text(leaf: _Leaf) -> int:
    value = leaf.value
    if isinstance(value, torch.Tensor):
        text = f"{value.dtype} {tuple(value.shape)}"
    elif isinstance(value, np.ndarray):
        text = f"{value.dtype} {value.shape} {value.tobytes().hex()}"
    elif isinstance(value, _PLAIN):
        text = repr(value)
    else:
        raise TreeError(
            "every leaf of `tree` must be a tensor, an array, a number or text to be hashed",
            got=f"`{leaf.path}`, a {type(value).__name__}: {short_repr(value)}",
            fix="leave the leaf out, or write `assert_replicated(tree, ctx)`, which pickles it",
        )
    return xxhash.xxh3_64_intdigest(f"{leaf.path} {text}".encode())


def _int64(numbers: Sequence[int], device: torch.device) -> torch.Tensor:
    """Return numbers modulo 2^64 as signed ones, on a device."""
    signed = [(number + 2**63) % 2**64 - 2**63 for number in numbers]
    return torch.tensor(signed, dtype=torch.int64).to(device)


def _weight(leaf: _Leaf, ctx: DistContext) -> int:
    """Return the factor of the hash of a leaf; those of ranks with copies have the sum 0."""
    weight = 0
    for axis in leaf.axes:
        index, size = ctx.comm.rank(axis), ctx.comm.size(axis)
        # r_0 - r_1, r_1 - r_2, ..., r_n - r_0 for random numbers r
        key = xxhash.xxh3_64_intdigest(axis.encode())
        weight += mix(key, index) - mix(key, (index + 1) % size)
    return weight


def _leaves(tree: Tree, ctx: DistContext, axis: str) -> Iterator[_Leaf]:
    names: dict[int, str] = {}
    for model in ctx.lifetime.models():
        assert isinstance(model, WrappedModel)
        for name, param in model.named_parameters():
            names[id(param)] = name
    for path, value, is_of_model in _expanded("", tree, names):
        yield _Leaf(
            path, _local(value), _axes_of(value, axis, ctx.mesh.spec, is_of_model=is_of_model)
        )


def _local(value: Tree) -> Tree:
    if isinstance(value, torch.Tensor):
        return local_tensor(value)
    return value


def _expanded(
    prefix: str, tree: Tree, names: Mapping[int, str]
) -> Iterator[tuple[str, Tree, bool]]:
    """Yield path and value of each leaf, and whether it belongs to a model or an optimizer."""
    if isinstance(tree, (WrappedModel, Optimizer)):
        values = _of_model(tree) if isinstance(tree, WrappedModel) else _of_optimizer(tree, names)
        yield from _with_paths(prefix, values, is_of_model=True)
    elif type(tree) in (dict, list, tuple):
        keys = sorted(tree, key=repr) if isinstance(tree, dict) else range(len(tree))
        for key in keys:
            yield from _expanded(f"{prefix}[{key!r}]", tree[key], names)
    else:
        yield from _with_paths(prefix, tree, is_of_model=False)


def _with_paths(prefix: str, tree: Tree, *, is_of_model: bool) -> Iterator[tuple[str, Tree, bool]]:
    for path, leaf in zip(paths(tree, prefix), flatten(tree)[0], strict=True):
        yield path, leaf, is_of_model


def _of_model(model: WrappedModel) -> dict[str, Tree]:
    params = dict(model.named_parameters())
    grads: dict[str, torch.Tensor] = {}
    for name, param in params.items():
        # FSDP2 accumulates each rank's own gradient until it reduces them.
        if param.grad is not None and not is_unreduced(param.grad):
            grads[name] = param.grad
    return {"params": params, "buffers": dict(model.module.named_buffers()), "grads": grads}


def _of_optimizer(opt: Optimizer, names: Mapping[int, str]) -> dict[str, Tree]:
    state: dict[str, Tree] = {}
    groups: list[dict[str, Tree]] = []
    number = 0
    for group in opt.param_groups:
        options = {key: value for key, value in group.items() if isinstance(value, _OPTIONS)}
        groups.append(options)
        for param in group["params"]:
            name = names.get(id(param), f"parameter {number}")
            number += 1
            # Under ZeRO-1 this rank has none of the others' states.
            if param in opt.state:
                state[name] = opt.state[param]
    return {"state": state, "param_groups": groups}


def _axes_of(value: Tree, axis: str, spec: MeshSpec, *, is_of_model: bool) -> tuple[str, ...]:
    """Return the axes on which a value has copies, within the axis that is compared."""
    if not (isinstance(value, torch.Tensor) and is_sharded(value)):
        # Other stages of a pipeline have other parameters.
        if is_of_model and axis == WORLD:
            return ("stage",)
        return (axis,)
    if not is_dtensor(value):
        return ()
    sharded: set[str] = {"pp"}
    dim_names: tuple[str, ...] = value.device_mesh.mesh_dim_names  # type: ignore[attr-defined]
    placements = value.placements  # type: ignore[attr-defined]
    for name, placement in zip(dim_names, placements, strict=True):
        if placement.is_replicate():
            continue
        # `ep` and `ep_storage` are views of the ranks along these axes.
        axes_of_dim = VIEWS.get(name, (name,))
        if name.startswith("ep"):
            axes_of_dim = EXPERT_AXES
        sharded.update(axes_of_dim)
    compared = AXES if axis == WORLD else VIEWS.get(axis, (axis,))
    return tuple(name for name in compared if name not in sharded and getattr(spec, name) > 1)


def _raise_difference(
    leaves: Sequence[_Leaf], hashes: Sequence[int], ctx: DistContext, axis: str
) -> None:
    hash_of_path: dict[str, int] = {}
    axes_of_path: dict[str, list[str]] = {}
    for leaf, value in zip(leaves, hashes, strict=True):
        hash_of_path[leaf.path] = value
        axes_of_path[leaf.path] = list(leaf.axes)
    ranks = _ranks_of(axis, ctx)
    hashes_by_rank = dict(zip(ranks, gather_json(hash_of_path, ctx, axis=axis), strict=True))
    # Of the leaves that this rank does not have, too.
    for axes_on_rank in gather_json(axes_of_path, ctx, axis=axis):
        axes_of_path = axes_on_rank | axes_of_path
    messages: list[str] = []
    for path, axes in axes_of_path.items():
        # By the lowest rank with a copy of the same value: the hash on each rank. A leaf that a
        # rank does not have is a difference, too.
        groups: dict[int, dict[int, int | None]] = {}
        for rank in ranks:
            first = _first_copy(ctx.mesh.spec, rank, axes)
            groups.setdefault(first, {})[rank] = hashes_by_rank[rank].get(path)
        different = [group for group in groups.values() if len(set(group.values())) > 1]
        messages += [_describe(path, group) for group in different]
    more = ""
    if len(messages) > 1:
        more = f"; {len(messages) - 1} more differ"
    raise AssertionError(f"{messages[0]}{more}")


def _ranks_of(axis: str, ctx: DistContext) -> Sequence[int]:
    if axis == WORLD:
        return range(ctx.world_size)
    return ctx.mesh.spec.peers(ctx.rank, axis)


def _first_copy(spec: MeshSpec, rank: int, axes: Sequence[str]) -> int:
    """Return the lowest rank with a copy of what `rank` has."""
    for axis in axes:
        rank = 0 if axis == WORLD else spec.peers(rank, axis)[0]
    return rank


def _describe(path: str, hash_of_rank: Mapping[int, int | None]) -> str:
    (majority, count), *others = Counter(hash_of_rank.values()).most_common()
    if others and others[0][1] == count:
        ranks = list(hash_of_rank)
        return f"`{path}` differs between {_join(ranks)}, and no value has a majority"
    different = [rank for rank, value in hash_of_rank.items() if value != majority]
    equal = [rank for rank, value in hash_of_rank.items() if value == majority]
    return f"`{path}` differs on {_join(different)} from {_join(equal)}"


def _join(ranks: Sequence[int]) -> str:
    noun = "rank" if len(ranks) == 1 else "ranks"
    return f"{noun} {', '.join(map(str, ranks))}"
