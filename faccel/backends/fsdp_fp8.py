"""fp8 under FSDP2: which weights are gathered in fp8, and their scales.

FSDP2 lets a parameter choose what is gathered: torchao's class of weights casts its shard to fp8
first. All ranks need the same scale, so the largest element is reduced over them. torchao reduces
it for each weight when that is gathered; here it is reduced for all weights at once, in the first
forward after they have changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import attrs
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from faccel.backends.fsdp_layout import Layout
from faccel.backends.fsdp_registration import version_of_shard
from faccel.context import DistContext
from faccel.errors import ConfigError
from faccel.plan import Plan
from faccel.torch_names import all_gather_single
from faccel.tree import is_cast_shard, is_dtensor


def convert_layers(module: nn.Module, layout: Layout, plan: Plan, ctx: DistContext) -> None:
    """Convert the fp8 layers of a layout, before its parameters are sharded. Updates `module`.

    Raises:
        ConfigError: FSDP2 cannot gather the weights in fp8 as planned.
    """
    fp8 = layout.fp8
    if not fp8.layers:
        return
    options = fp8.options
    if not options.all_gather or options.recipe != "tensorwise" or options.backend != "torchao":
        fp8.convert()
        return
    reshard = plan.fsdp.reshard_after_forward
    if isinstance(reshard, int) and not isinstance(reshard, bool):
        raise ConfigError(
            "FSDP2 cannot keep weights in fp8 sharded over fewer ranks between forward and "
            "backward",
            got=f"reshard_after_forward={reshard}",
            fix="write `reshard_after_forward=True`, or "
            "`fp8=faccel.parallel.Fp8(all_gather=False)`",
        )
    gathered_as_stored: list[str] = []
    for name, layer in fp8.layers.items():
        if f"{name}.weight" in layout.ignored or not _has_rows_on_all_ranks(layer, ctx):
            gathered_as_stored.append(name)
    fp8.without(gathered_as_stored).convert(all_gather=True)
    fp8.only(gathered_as_stored).convert()


def _has_rows_on_all_ranks(layer: nn.Linear, ctx: DistContext) -> bool:
    """Return whether each rank gets a row of the weight: an empty shard has no largest element."""
    spec = ctx.mesh.spec
    num_rows = layer.weight.shape[0] // spec.tp  # the rows of a layer that is `colwise`
    num_ranks = spec.dp_shard * spec.cp
    rows_per_rank = -(-num_rows // num_ranks)
    return (num_ranks - 1) * rows_per_rank < num_rows


def gather_as_bytes(module: nn.Module) -> None:
    """Let the units with weights in fp8 gather bytes. Updates `module`.

    FSDP2 does so if a unit has parameters of several dtypes, and otherwise gathers fp8: gloo and
    older versions of NCCL have no such type.
    """
    for submodule in module.modules():
        if not isinstance(submodule, FSDPModule):
            continue
        for param in submodule.parameters():
            if _is_cast_shard(param):
                # Of the unit or of an inner one; then it gathers the same in another dtype.
                submodule.set_custom_all_gather(cast("Any", _AllGatherBytes()))
                break


def _is_cast_shard(param: torch.Tensor) -> bool:
    return is_dtensor(param) and is_cast_shard(cast("Any", param)._local_tensor)


class _AllGatherBytes:
    """An all-gather as FSDP2's, of bytes."""

    # The two methods of FSDP2's protocol `AllGather`.
    def allocate(
        self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,  # noqa: FBT001, FBT002 (FSDP2's signature)
    ) -> dist.Work | None:
        return all_gather_single(
            output_tensor.view(torch.uint8),
            input_tensor.view(torch.uint8),
            group=group,
            async_op=async_op,
        )


@attrs.define(eq=False)
class Fp8Scales:
    """The scales of the weights that are gathered in fp8.

    Args:
        module: A module that FSDP2 has sharded, or one with such modules.
    """

    module: nn.Module
    _shards: Sequence[Any] = attrs.field(init=False)
    _version: int | None = attrs.field(default=None, init=False)
    """The version of the shards that the scales belong to; None before the first."""

    def __attrs_post_init__(self) -> None:
        shards: list[Any] = []
        for param in self.module.parameters():
            if _is_cast_shard(param):
                shards.append(param)  # noqa: PERF401
        self._shards = shards

    def refresh(self) -> None:
        """Compute the scales, if a weight has changed since. Collective then.

        Call it while the sharded parameters are registered with the modules.
        """
        if not self._shards:
            return
        # Every rank runs the same updates, so all ranks take the same branch.
        version = sum(map(version_of_shard, self._shards))
        if version == self._version:
            return
        from torchao.float8 import precompute_float8_dynamic_scale_for_fsdp

        precompute_float8_dynamic_scale_for_fsdp(self.module)
        self._version = version

    def watch(self, opt: Optimizer) -> None:
        """Compute the scales again after each step of `opt`. Registers a hook."""
        # Some optimizers write to `param.data`, which changes no version.
        if self._shards:
            opt.register_step_post_hook(self._forget)

    def _forget(self, opt: Optimizer, args: object, kwargs: object) -> None:
        self._version = None
