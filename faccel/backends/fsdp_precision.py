"""The precision of a sharded model: that of autocast, as under DDP.

The mixed precision of FSDP2 is another computation: it casts the inputs of a model and all
parameters, also those of norms and of blocks with `torch.autocast(enabled=False)`. So parameters
are gathered as they are stored, and autocast casts them in the operations that compute in low
precision. `FsdpConfig(low_precision_params=True)` chooses FSDP2's way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from faccel.backends.fsdp_layout import Layout
from faccel.context import DistContext
from faccel.errors import ConfigError, short_repr
from faccel.plan import Plan
from faccel.tree import Tree

if TYPE_CHECKING:
    from torch.distributed.fsdp import MixedPrecisionPolicy


_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def precision_policy(
    layout: Layout, plan: Plan, ctx: DistContext
) -> Callable[[str], MixedPrecisionPolicy]:
    """Return a function from the name of a module to its policy."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    # A sum over many ranks in bf16 or fp16 rounds small gradients away, so it is a user's choice.
    reduce_dtype = _DTYPES[plan.fsdp.reduce_dtype or "fp32"]
    if ctx.param_dtype is not None:
        _check_no_fp32_units(plan, ctx)
        true_precision = MixedPrecisionPolicy(reduce_dtype=reduce_dtype)
        return lambda name: true_precision
    if ctx.compute_dtype is None:
        if plan.fsdp.reduce_dtype is None:
            reduce_dtype = None  # that of the parameters, such as fp64
        full_precision = MixedPrecisionPolicy(reduce_dtype=reduce_dtype)
        return lambda name: full_precision
    param_dtype = None
    if plan.fsdp.low_precision_params:
        param_dtype = ctx.compute_dtype
    low = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype)
    # FSDP2 casts the inputs of a unit to its `param_dtype`, so a unit in fp32 gets fp32 inputs.
    high = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=reduce_dtype)

    def policy_of(name: str) -> MixedPrecisionPolicy:
        if layout.computes_in_fp32(name):
            return high
        return low

    return policy_of


def _check_no_fp32_units(plan: Plan, ctx: DistContext) -> None:
    if plan.fsdp.fp32_units:
        raise ConfigError(
            "`fp32_units` needs parameters in fp32",
            got=f"mixed_precision={short_repr(ctx.config.mixed_precision)}, "
            f"fp32_units={plan.fsdp.fp32_units}",
            fix='use `mixed_precision="bf16"`, or leave `fp32_units` out',
        )


def switch_autocast(layout: Layout, plan: Plan, ctx: DistContext) -> None:
    """Turn autocast off in units in fp32, and on again in other units inside of them.

    Registers hooks of `nn.Module`; updates the units.
    """
    if ctx.compute_dtype is None:
        return
    for name, unit in layout.units.items():
        outer_name = name.rpartition(".")[0]
        is_fp32 = layout.computes_in_fp32(name)
        is_outer_fp32 = outer_name != name and layout.computes_in_fp32(outer_name)
        if is_fp32 != is_outer_fp32:
            _register_autocast(unit, ctx, enabled=not is_fp32, is_compiled=plan.compile is not None)


def _register_autocast(
    unit: nn.Module, ctx: DistContext, *, enabled: bool, is_compiled: bool
) -> None:
    # A stack, because the forward of a unit may call the unit itself.
    contexts: list[torch.autocast] = []

    def enter(module: nn.Module, args: tuple[Tree, ...]) -> None:
        # Without the cache, as in `forward_precision`.
        context = torch.autocast(
            ctx.device.type, dtype=ctx.compute_dtype, enabled=enabled, cache_enabled=False
        )
        context.__enter__()
        contexts.append(context)

    def leave(module: nn.Module, args: tuple[Tree, ...], output: Tree) -> None:
        # Empty where an earlier hook raised before `enter`.
        if contexts:
            contexts.pop().__exit__(None, None, None)

    if is_compiled:
        # Dynamo would trace the stack. Outside of its graphs both hooks run as they are.
        enter = torch.compiler.disable(enter)  # type: ignore[assignment]
        leave = torch.compiler.disable(leave)  # type: ignore[assignment]
    unit.register_forward_pre_hook(enter)
    # Also after an exception: autocast of this thread must not stay off.
    unit.register_forward_hook(leave, always_call=True)
