"""Calls of a model's methods: through an engine's `forward`, and in the configured precision."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from operator import attrgetter
from typing import TYPE_CHECKING

import torch
from torch import nn

from faccel.context import DistContext
from faccel.errors import ModelError
from faccel.parallel.eager_code import without_graph, without_graphs
from faccel.plan import Plan
from faccel.training.precision import autocast
from faccel.training.true_precision import cast_inputs
from faccel.tree import Tree, map_leaves

if TYPE_CHECKING:
    from faccel.protocols import RunMethod


class Methods(nn.Module):
    """A module whose `forward` calls any method of another one, so that an engine's hooks run."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, method: str, *args: Tree, **kwargs: Tree) -> Tree:
        """Call `method` of the module; see `call_method`."""
        return call_method(self.module, method, *args, **kwargs)


def call_method(module: nn.Module, method: str, *args: Tree, **kwargs: Tree) -> Tree:
    """Call a method or submodule. `"forward"` goes through `__call__`, so that hooks run."""
    # `module.forward(...)` would skip the hooks of `nn.Module`, also those of FSDP2.
    if method == "forward":
        return module(*args, **kwargs)
    return attrgetter(method)(module)(*args, **kwargs)


def with_precision(run: RunMethod, ctx: DistContext) -> RunMethod:
    """Return `run` in the precision of the context, with fp32 outputs; `run` itself in fp32."""
    dtype = ctx.param_dtype
    if dtype is not None:
        return _with_param_dtype(run, dtype)
    if ctx.compute_dtype is None:
        return run

    @without_graph
    def run_autocast(method: str, *args: Tree, **kwargs: Tree) -> Tree:
        with autocast(ctx):
            out = run(method, *args, **kwargs)
        return to_fp32(out)

    return run_autocast


def _with_param_dtype(run: RunMethod, dtype: torch.dtype) -> RunMethod:
    def run_cast(method: str, *args: Tree, **kwargs: Tree) -> Tree:
        args, kwargs = cast_inputs(args, kwargs, dtype)
        return to_fp32(run(method, *args, **kwargs))

    return run_cast


@contextmanager
def forward_precision(plan: Plan, ctx: DistContext) -> Generator[None]:
    """Run the forward of a sharded model under autocast, as `with_precision` does for others.

    Raises:
        ModelError: An operation has inputs of two dtypes because of `low_precision_params`.
    """
    if ctx.compute_dtype is None:
        yield
        return
    # The cache would keep a cast copy of every gathered parameter until the end of forward.
    context = torch.autocast(ctx.device.type, dtype=ctx.compute_dtype, cache_enabled=False)
    try:
        with context:
            yield
    except RuntimeError as error:
        if plan.fsdp.low_precision_params and _names_dtypes(error):
            raise ModelError(
                f"an operation has inputs in fp32 and in {ctx.config.mixed_precision}, because "
                "`low_precision_params` also casts the parameters of norms and fp32 blocks",
                got=str(error).partition("\n")[0],
                fix="leave `low_precision_params` out, or name the unit of this operation in "
                "`fsdp=faccel.parallel.FsdpConfig(low_precision_params=True, fp32_units=(...))`",
            ) from error
        raise


def _names_dtypes(error: RuntimeError) -> bool:
    """Whether an error of PyTorch is about the dtypes of the inputs of an operation."""
    message = str(error)
    return any(word in message for word in ("BFloat16", "Half", "dtype", "scalar type"))


@without_graphs
def to_fp32(tree: Tree) -> Tree:
    """Return `tree` with its fp16 and bf16 tensors in fp32."""
    return map_leaves(_leaf_to_fp32, tree)


def _leaf_to_fp32(leaf: object) -> object:
    # Losses and metrics are computed in fp32 by the caller, outside of autocast.
    if isinstance(leaf, torch.Tensor) and leaf.dtype in (torch.float16, torch.bfloat16):
        return leaf.float()
    return leaf
