"""Tensors of which each rank holds a run of elements: how engines lie that flatten a model before they share it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import torch

from faccel.errors import ModelError


@attrs.frozen
class Box:
    """A part of a tensor that is a product of ranges.

    Args:
        offsets: Where it begins.
        sizes: How far it reaches, in each dim.
        start: Which element of the run it begins with.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    start: int


def boxes(shape: Sequence[int], first: int, count: int) -> list[Box]:
    """Cut a run of elements, counted in row-major order, into parts that are products of ranges, in order.

    Effects: pure. At most `2 * len(shape) - 1` of them.

    Args:
        shape: Of the tensor.
        first: Number of the first element.
        count: How many.

    Examples:
        >>> [(box.offsets, box.sizes) for box in boxes((4, 3), 2, 8)]
        [((0, 2), (1, 1)), ((1, 0), (2, 3)), ((3, 0), (1, 1))]
    """
    found: list[Box] = []
    done = 0
    while done < count:
        at, left = first + done, count - done
        dim = _outermost(shape, at, left)
        inner = math.prod(shape[dim + 1 :])
        offsets = [(at // math.prod(shape[i + 1 :])) % shape[i] for i in range(len(shape))]
        rows = min(left // inner, shape[dim] - offsets[dim]) if shape else 1
        sizes = [1] * dim + [rows] * bool(shape) + list(shape[dim + 1 :])
        found.append(Box(tuple(offsets), tuple(sizes), done))
        done += rows * inner
    return found


def _outermost(shape: Sequence[int], at: int, left: int) -> int:
    """Return the first dim in which a part that begins at element `at` may reach over several rows."""
    for dim in range(len(shape)):
        inner = math.prod(shape[dim + 1 :])
        if at % inner == 0 and left >= inner:
            return dim
    return max(0, len(shape) - 1)


class FlatShard(torch.Tensor):
    """A tensor of which this rank holds a run of elements, in row-major order.

    It has a shape and a dtype, and nothing can be computed with it: torch's distributed checkpoint asks it for its
    parts, `full_tensor` gives the whole. Writing into `part` is writing into it.

    Args:
        shape: Of the whole tensor.
        part: `T[count]`, this rank's elements, where they are.
        first: Number of the first of them.
        add_up: `add_up(x)`: the sum of every rank's `x`; collective.
        owner: What tensors that are one have in common.
    """

    part: torch.Tensor
    first: int
    add_up: Callable[[torch.Tensor], torch.Tensor]
    owner: object

    @staticmethod
    def __new__(
        cls: type[FlatShard],
        shape: Sequence[int],
        part: torch.Tensor,
        first: int,
        add_up: Callable[[torch.Tensor], torch.Tensor],
        owner: object = None,
    ) -> FlatShard:
        make: Any = torch.Tensor._make_wrapper_subclass  # type: ignore[attr-defined]
        new = make(cls, tuple(shape), dtype=part.dtype, device=part.device)
        new.part, new.first, new.add_up, new.owner = part, first, add_up, owner
        return new

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return args[0].like(args[0].part)
        raise ModelError(
            "this rank holds a part of the tensor, so nothing can be computed with it",
            got=f"`{func}`",
            fix="call `.full_tensor()` on every rank first",
        )

    def __repr__(self, **kwargs: Any) -> str:
        return f"FlatShard({list(self.shape)}, {self.dtype}, {self.part.numel()} elements from {self.first})"

    def like(self, part: torch.Tensor) -> FlatShard:
        """Return a tensor that lies on the ranks as this one does, with other elements."""
        return FlatShard(self.shape, part, self.first, self.add_up, self.owner)

    def full_tensor(self) -> torch.Tensor:
        """Return the whole tensor, fresh, on every rank. Collective."""
        flat = torch.zeros(self.numel(), dtype=self.dtype, device=self.device)
        flat[self.first : self.first + self.part.numel()] = self.part
        return self.add_up(flat).reshape(self.shape)

    def assign(self, whole: torch.Tensor) -> None:
        """Write this rank's part of `whole`. Updates the tensor."""
        if isinstance(whole, FlatShard):
            self.part.copy_(whole.part)
        else:
            self.part.copy_(whole.reshape(-1)[self.first : self.first + self.part.numel()])

    def _boxes(self) -> list[Box]:
        return boxes(self.shape, self.first, self.part.numel())

    def __create_write_items__(self, fqn: str, tensor: Any) -> list[Any]:
        from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
        from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

        properties = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                index=MetadataIndex(fqn, torch.Size(box.offsets)),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=_chunk(box), properties=properties, size=self.shape
                ),
            )
            for box in self._boxes()
        ]

    def __create_chunk_list__(self) -> list[Any]:
        return [_chunk(box) for box in self._boxes()]

    def __get_tensor_shard__(self, index: Any) -> torch.Tensor:
        box = next(each for each in self._boxes() if torch.Size(each.offsets) == index.offset)
        return self.part[box.start : box.start + math.prod(box.sizes)].view(box.sizes)


def _chunk(box: Box) -> Any:
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

    return ChunkStorageMetadata(offsets=torch.Size(box.offsets), sizes=torch.Size(box.sizes))
