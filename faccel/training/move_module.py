"""Moves a module to a device, so that tied parameters stay tied on every type of device."""

from __future__ import annotations

import torch
from torch import nn

from faccel.errors import ModelError


def move_module(module: nn.Module, device: torch.device) -> None:
    """Move a module to a device. Its parameters stay the same objects.

    `nn.Module.to` creates new parameters on devices that a plugin adds to PyTorch (TPU, NPU, ...):
    it would untie tied ones, and an optimizer that exists already would keep the old ones.

    Effects: updates module.

    Raises:
        ModelError: A parameter is in use, so that it cannot be moved in place.
    """
    on_host = [param for param in module.parameters() if param.device != device]
    if not on_host or _keeps_params(on_host[0], device):
        module.to(device)
        return
    # PyTorch's swap of a gradient fails for the second name of a tied parameter.
    grads = {param: param.grad for param in on_host}
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        for param in on_host:
            param.grad = None
        module.to(device)
    except RuntimeError as error:
        raise ModelError(
            f"the model cannot be moved to `{device}`: a parameter is in use",
            got=str(error),
            fix="wrap it before its first forward, or delete the outputs of earlier forwards",
        ) from error
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
        for param, grad in grads.items():
            if grad is not None:
                param.grad = grad.to(param.device)


def _keeps_params(param: nn.Parameter, device: torch.device) -> bool:
    """Return whether `nn.Module.to` moves the data of a parameter, as to a GPU."""
    target = torch.empty(0, device=device)
    return torch._has_compatible_shallow_copy_type(  # pyright: ignore[reportPrivateUsage]
        param, target
    )
