"""Full tensors of a model, from shards and from the stages of a pipeline."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import attrs
import torch

from faccel.comm.objects import gather_objects
from faccel.context import DistContext
from faccel.offloaded_tensor import OffloadedTensor
from faccel.tree import full_tensor


@attrs.frozen
class TensorSpec:
    """Shape, dtype and pipeline rank of a tensor.

    Args:
        pp_rank: The first rank of the axis `pp` that has the tensor.
        shape: Its full shape.
        dtype: Its dtype.
    """

    pp_rank: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class FullTensors:
    """Gathers full tensors by name. Creating it is collective over a pipeline.

    Args:
        tensors: This rank's tensors and shards by name; in a pipeline those of its stages.
        ctx: The context of the model.

    Attributes:
        specs: Of the tensors of all stages; equal on every rank, in one order.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], ctx: DistContext) -> None:
        self._tensors = tensors
        self._ctx = ctx
        self.specs: dict[str, TensorSpec] = {}
        is_pipeline = ctx.mesh.spec.pp > 1
        pp_rank = 0
        if is_pipeline:
            pp_rank = ctx.comm.rank("pp")
        specs: dict[str, TensorSpec] = {}
        for name, tensor in tensors.items():
            specs[name] = TensorSpec(pp_rank, tuple(tensor.shape), tensor.dtype)
        stages = [specs]
        if is_pipeline:
            stages = gather_objects(specs, ctx, axis="pp")
        for stage in stages:
            for name, spec in stage.items():  # the first stage of a tied tensor
                self.specs.setdefault(name, spec)

    def sizes(self) -> dict[str, int]:
        """Return the sizes of all tensors of the model in bytes."""
        sizes: dict[str, int] = {}
        for name, spec in self.specs.items():
            sizes[name] = math.prod(spec.shape) * spec.dtype.itemsize
        return sizes

    def on_rank_0(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """Return full tensors on the CPU of rank 0; they may alias this rank's. Collective."""
        tensors: dict[str, torch.Tensor] = {}
        for name in names:
            tensor = self.full(name)
            if self._ctx.is_main:  # the other ranks drop it at once
                tensors[name] = tensor.cpu()
        return tensors

    def full(self, name: str) -> torch.Tensor:
        """Return a full tensor on every rank; it may alias this rank's tensor. Collective."""
        if self._ctx.mesh.spec.pp == 1:  # every rank has a shard of every tensor
            tensor = self._tensors[name]
            if isinstance(tensor, OffloadedTensor):
                return tensor.read()
            return full_tensor(tensor)
        spec = self.specs[name]
        if spec.pp_rank == self._ctx.comm.rank("pp"):
            tensor = full_tensor(self._tensors[name]).to(self._ctx.device)
        else:
            tensor = torch.empty(spec.shape, dtype=spec.dtype, device=self._ctx.device)
        return self._ctx.comm.broadcast(tensor, spec.pp_rank, "pp")
