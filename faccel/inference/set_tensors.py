"""Puts parameters and buffers into modules."""

from __future__ import annotations

import torch
from torch import nn


def set_param(module: nn.Module, name: str, param: nn.Parameter) -> None:
    """Replace a parameter. Updates `module`."""
    # Not `setattr`, which calls a `__setattr__` that the user's module may define.
    module._parameters[name] = param  # pyright: ignore[reportPrivateUsage]


def set_buffer(module: nn.Module, name: str, buffer: torch.Tensor) -> None:
    """Replace a buffer. Updates `module`."""
    module._buffers[name] = buffer  # pyright: ignore[reportPrivateUsage]
