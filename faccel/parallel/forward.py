"""Running a method of a model: through an engine that only knows `forward`, and in the configured precision."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from faccel.context import DistContext
from faccel.protocols import RunMethod
from faccel.training.precision import autocast
from faccel.tree import Tree, map_leaves


class Methods(nn.Module):
    """A module whose forward calls any method of another, so that an engine's hooks see each of them."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call `method` of the module; `forward` with the module's own hooks."""
        return call_method(self.module, method, *args, **kwargs)


def call_method(module: nn.Module, method: str, *args: Any, **kwargs: Any) -> Any:
    """Call `method` of `module`; `forward` through `__call__`, so that its hooks run."""
    if method == "forward":
        return module(*args, **kwargs)
    return getattr(module, method)(*args, **kwargs)


def with_precision(run: RunMethod, ctx: DistContext) -> RunMethod:
    """Return `run` under autocast, with low-precision outputs brought back to fp32; `run` itself without."""
    if ctx.compute_dtype is None:
        return run

    def run_autocast(method: str, *args: Any, **kwargs: Any) -> Any:
        with autocast(ctx):
            out = run(method, *args, **kwargs)
        return to_fp32(out)

    return run_autocast


def to_fp32(tree: Tree) -> Tree:
    """Return `tree` with its fp16 and bf16 tensors in fp32."""
    low = (torch.float16, torch.bfloat16)
    return map_leaves(
        lambda x: x.float() if isinstance(x, torch.Tensor) and x.dtype in low else x, tree
    )
