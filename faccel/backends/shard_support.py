"""Which optimizers can step the shards of parameters, and train as one process does."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.optim import Optimizer

from faccel.context import DistContext
from faccel.errors import OptimizerError
from faccel.tree import is_dtensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

# These multiply matrices, or compute one direction from all parameters. They need full tensors.
_NEED_FULL_PARAMETERS = ("LBFGS", "Muon")
# torchao quantizes a state with at least as many elements; smaller ones stay in fp32.
_MIN_QUANTIZED = 4096


def check_steps_shards(opt: Optimizer, ctx: DistContext) -> None:
    """Raise for an optimizer that cannot step the shards of its parameters.

    Raises:
        OptimizerError: It needs full parameters, its operators do not take shards, or it would
            quantize its states in other blocks than one process does.
    """
    if _is_from(opt, "torch.optim", _NEED_FULL_PARAMETERS):
        raise OptimizerError(
            f"{type(opt).__name__} needs full parameters, and this mesh shards them",
            got=f"a {type(opt).__name__} on the mesh {ctx.mesh.spec}",
            fix='write `faccel.init(mesh="dp_replicate=-1")`, or use an element-wise optimizer '
            "such as AdamW",
        )
    shards = list(_shards(opt))
    # Its operators are kernels of one device, without a rule for DTensor. LAMB, LARS and
    # `percentile_clipping` would also take the norm of a shard for that of the parameter.
    if shards and _is_from(opt, "bitsandbytes."):
        raise OptimizerError(
            "optimizers of bitsandbytes do not step sharded parameters",
            got=f"a {type(opt).__name__} on the mesh {ctx.mesh.spec}",
            fix='write `faccel.init(mesh="dp_replicate=-1")`, or use an optimizer of torchao, such '
            "as `torchao.optim.AdamW8bit`",
        )
    if _is_from(opt, "torchao.optim."):
        _check_whole_rows(opt, shards)


def _check_whole_rows(opt: Optimizer, shards: Sequence[DTensor]) -> None:
    """Raise where a block of elements with one scale is not a block on one process, too."""
    # Infinite for the optimizer that does not quantize.
    block_size: float = getattr(opt, "block_size", math.inf)
    for param in shards:
        size = _largest_shard(param)
        # As torchao decides; a state that no rank quantizes has no blocks.
        is_quantized = size >= _MIN_QUANTIZED and size % block_size == 0
        if is_quantized and not _has_consecutive_rows(param):
            raise OptimizerError(
                f"{type(opt).__name__} quantizes its states in blocks, and on this mesh they would "
                "be other blocks than on one process",
                got=f"a parameter of shape {list(param.shape)} with placements {param.placements}",
                fix='write `faccel.init(mesh="dp_shard=-1")`, which shards rows only, or use '
                "`torch.optim.AdamW`",
            )


def _largest_shard(param: DTensor) -> int:
    """Return the number of elements of rank 0's shard, which no rank's exceeds."""
    # The chunks of `torch.chunk`: all of one length but the last ones.
    shape = list(param.shape)
    for placement, num_ranks in zip(param.placements, param.device_mesh.shape, strict=True):
        if placement.is_shard():
            dim = cast("Any", placement).dim
            shape[dim] = -(-shape[dim] // num_ranks)
    return torch.Size(shape).numel()


def _has_consecutive_rows(param: DTensor) -> bool:
    """Return whether each rank has consecutive rows of a parameter, or all."""
    from torch.distributed.tensor import Shard

    # Two cuts of the rows, as under FSDP2 over expert parallel, interleave the rows of ranks.
    num_cuts = 0
    for placement, num_ranks in zip(param.placements, param.device_mesh.shape, strict=True):
        if placement.is_replicate() or num_ranks == 1:
            continue
        # The class itself: under FSDP2 over tensor parallel the rows are strided.
        if type(placement) is not Shard or placement.dim != 0:
            return False
        num_cuts += 1
    return num_cuts <= 1


def _shards(opt: Optimizer) -> Iterator[DTensor]:
    for group in opt.param_groups:
        for param in group["params"]:
            if is_dtensor(cast("torch.Tensor", param)):
                yield param


def _is_from(opt: Optimizer, module: str, names: tuple[str, ...] | None = None) -> bool:
    """Return whether an optimizer, or a class that it inherits from, is of a library."""
    # By name, because the library may not be installed. A subclass steps as its parent does.
    for cls in type(opt).__mro__:
        if cls.__module__.startswith(module) and (names is None or cls.__name__ in names):
            return True
    return False
