"""Which part of each full parameter a rank has, and its name in the full model.

Megatron-core describes both in `sharded_state_dict`, for its checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import nn

from faccel.context import DistContext
from faccel.errors import ModelError
from faccel.flat_shard import Block, FlatShard
from faccel.mesh import DATA


@attrs.frozen(eq=False)
class Elements:
    """A range of the elements of this rank's parameter, or of a state of its optimizer.

    Args:
        flat: `T[...]`, contiguous; it may be empty.
        start: Index of the first of them in the parameter.
        is_range: Whether other data ranks have the other elements.
    """

    flat: torch.Tensor
    start: int
    is_range: bool


@attrs.frozen(eq=False)
class ParamLayout:
    """A parameter of this rank, and where its elements are in the full model.

    Args:
        name: Its name in a model of one process.
        param: The parameter.
        shape: Shape of the full parameter.
        blocks: The parts of the full parameter that this rank has, in the order of its memory.
    """

    name: str
    param: nn.Parameter
    shape: torch.Size
    blocks: Sequence[Block]

    @property
    def is_sharded(self) -> bool:
        """Whether the ranks of `tp` have different elements."""
        return sum(block.numel for block in self.blocks) < math.prod(self.shape)

    def view_of(self, elements: Elements, ctx: DistContext) -> FlatShard:
        """Return a tensor of the full shape that aliases `elements`."""

        # Only over ranks that have other elements: a sum of replicas would be a multiple.
        def all_reduce(x: torch.Tensor) -> torch.Tensor:
            if self.is_sharded:
                x = ctx.comm.all_reduce(x, "sum", "tp")
            if elements.is_range:
                x = ctx.comm.all_reduce(x, "sum", DATA)
            return x

        flat = elements.flat.detach().view(-1)
        return FlatShard(self.shape, flat, elements.start, all_reduce, self.param, self.blocks)


def layouts_of(chunk: Any, ctx: DistContext) -> list[ParamLayout]:
    """Return the layout of each parameter of a model chunk, in the order of the parameters.

    Effects: pure.

    Raises:
        ModelError: A parameter is laid out in a way that checkpoints of faccel do not have.
    """
    layers = _numbers_of_layers(chunk)
    # Otherwise it stacks all layers into one tensor, whose first dim is the number of the layer.
    sharded: Mapping[str, Any] = chunk.sharded_state_dict(metadata={"non_homogeneous_layers": True})
    layouts: list[ParamLayout] = []
    for local_name, param in chunk.named_parameters():
        entry = sharded.get(local_name)
        if entry is None:
            raise ModelError(
                "a parameter is missing in `sharded_state_dict` of the model",
                got=f"`{local_name}` of a {type(chunk).__name__}",
                fix="add it to the method, which is Megatron-core's description of the shards",
            )
        name = with_layer_numbers(local_name, layers)
        # The last stage has a copy of the embedding, which the description names as the first one.
        if name == "output_layer.weight" and entry.key.endswith(_EMBEDDING):
            name = _EMBEDDING
        shape, blocks = _blocks_of(local_name, param, entry)
        layouts.append(ParamLayout(name, param, shape, blocks))
    return layouts


_EMBEDDING = "embedding.word_embeddings.weight"


def _numbers_of_layers(chunk: nn.Module) -> dict[str, str]:
    """Return the prefix of each layer in the full model by its prefix in this chunk."""
    prefixes: dict[str, str] = {}
    for name, module in chunk.named_modules():
        if not isinstance(module, nn.ModuleList):
            continue
        for index, layer in enumerate(module):
            # Counted from 1 through all stages; the index in the list, in this stage.
            number = getattr(layer, "layer_number", None)
            if isinstance(number, int):
                prefixes[f"{name}.{index}."] = f"{name}.{number - 1}."
    return prefixes


def with_layer_numbers(name: str, prefixes: Mapping[str, str]) -> str:
    """Return a name with the number that its layer has in the full model.

    Effects: pure.

    Examples:
        >>> with_layer_numbers("layers.0.mlp.bias", {"layers.0.": "layers.4."})
        'layers.4.mlp.bias'
    """
    for local, full in prefixes.items():
        if name.startswith(local):
            return full + name.removeprefix(local)
    return name


def names_of_entries(chunk: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield the name of each entry of the chunk's `state_dict`, and its name in the full model."""
    layers = _numbers_of_layers(chunk)
    for name in chunk.state_dict():
        yield name, with_layer_numbers(name, layers)


def _blocks_of(name: str, param: nn.Parameter, entry: Any) -> tuple[torch.Size, tuple[Block, ...]]:
    """Return the shape of the full parameter, and the blocks of it in this rank's memory."""
    entries = [entry]
    # Several tensors in one, such as the two of SwiGLU: each is cut over the ranks of `tp`, so a
    # rank has two blocks of the full parameter.
    if hasattr(entry, "build_fn"):
        entries = list(_leaves(entry.build()))
    shapes = {tuple(sharded.global_shape) for sharded in entries}
    position = 0
    blocks: list[Block] = []
    for sharded in entries:
        # Views of the parameter, one after the other in its memory.
        start = sharded.data.storage_offset() - param.storage_offset()
        is_in_order = sharded.data.is_contiguous() and start == position
        # Experts have a dim before those of the parameter: the number of the expert.
        num_dims = sharded.prepend_axis_num
        if len(shapes) > 1 or num_dims or not is_in_order:
            raise ModelError(
                f"`{name}` is laid out in a way that checkpoints of faccel do not have",
                got=f"tensors of shapes {sorted(shapes)}, {num_dims} dims before them",
                fix="train a model of dense layers, without experts",
            )
        blocks.append(Block(tuple(sharded.global_offset), tuple(sharded.local_shape)))
        position += sharded.data.numel()
    return torch.Size(shapes.pop()), tuple(blocks)


def _leaves(tree: Any) -> Iterator[Any]:
    if isinstance(tree, Mapping):
        tree = list(tree.values())
    if not isinstance(tree, list):
        yield tree
        return
    for item in tree:
        yield from _leaves(item)
