"""Layers that are stored in a smaller dtype than they compute in, for inference and adapters.

A hook before the forward of a layer puts cast copies of its parameters in their places, and a hook
after it puts the stored ones back. So one layer at a time has its full size; where adapters train,
autograd keeps the copies until backward.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import nn

from faccel.context import DistContext
from faccel.errors import ConfigError, ModelError
from faccel.parallel.sensitive_layers import (
    is_sensitive,
    num_owners_of_params,
    skipped_modules,
)
from faccel.plan import Plan
from faccel.tree import Tree

_logger = logging.getLogger(__name__)

# The layers of which Accelerate and diffusers cast the parameters. Exact classes: a subclass, such
# as the output projection of `nn.MultiheadAttention`, may be read by another module's forward.
_CLASSES = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
_COMPUTE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def refuse_stored_layers(plan: Plan, ctx: DistContext) -> None:
    """Raise if a plan stores layers in a smaller dtype, where the strategy shards parameters.

    Raises:
        ConfigError: It does.
    """
    if plan.layerwise_casting is not None:
        raise ConfigError(
            "`layerwise_casting` needs a full copy of the parameters on every rank",
            got=f"the strategy `{ctx.parallelism.name}` on the mesh {ctx.mesh.spec}",
            fix='write `faccel.init(mesh="dp_replicate=-1")`, or leave `layerwise_casting` out',
        )


def store_layers(module: nn.Module, plan: Plan, ctx: DistContext) -> None:
    """Cast the frozen layers of a model to the dtype of the plan, and register their hooks.

    Effects: updates module. Layers that have the hooks already stay as they are.

    Raises:
        ConfigError: There is no such layer, or a pattern matches nothing.
        ModelError: A weight is too large for the dtype.
    """
    options = plan.layerwise_casting
    if options is None:
        return
    dtype: torch.dtype = getattr(torch, options.storage_dtype)
    skipped = skipped_modules(module, options.skip, _is_skipped)
    layers = {name: layer for name, layer in _frozen_layers(module).items() if name not in skipped}
    if not layers:
        raise ConfigError(
            "`layerwise_casting` found no frozen linear or convolution layer to store",
            got=f"a {type(module).__name__}",
            fix="write `net.requires_grad_(False)` before `faccel.wrap(net, ctx)`: a trained "
            "weight needs its full dtype",
        )
    # All before the first is changed, so that an error leaves the model as it was.
    for name, layer in layers.items():
        _check_range(name, layer, dtype)
    for layer in layers.values():
        _store(layer, dtype)
    if ctx.is_main:
        cls = type(module).__name__
        _logger.info("%d layers of %s are stored in %s", len(layers), cls, options.storage_dtype)


def _is_skipped(name: str) -> bool:
    """Return whether a module is left out by default: the patterns of diffusers, and of fp8."""
    last = name.rpartition(".")[2]
    is_skipped = "norm" in last or "embed" in last or last in ("proj_in", "proj_out")
    return is_skipped or is_sensitive(name)


def _frozen_layers(module: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that can be stored by name, those with hooks already among them."""
    num_owners = num_owners_of_params(module)
    layers: dict[str, nn.Module] = {}
    for name, layer in module.named_modules():
        params = list(layer.parameters(recurse=False))
        if type(layer) not in _CLASSES or any(param.requires_grad for param in params):
            continue
        # The other owner of a tied weight, such as an embedding, would read the stored dtype.
        if all(num_owners[id(param)] == 1 for param in params):
            layers[name] = layer
    return layers


def _hooks_of(layer: nn.Module) -> _CastParams | None:
    """Return the hooks of a layer that is stored already."""
    for hook in layer._forward_pre_hooks.values():  # pyright: ignore[reportPrivateUsage]
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, _CastParams):
            return owner
    return None


def _check_range(name: str, layer: nn.Module, dtype: torch.dtype) -> None:
    if _hooks_of(layer) is not None:
        return
    for param_name, param in layer.named_parameters(recurse=False):
        if param.dtype not in _COMPUTE_DTYPES:
            raise ModelError(
                "a layer is stored in a small dtype already, so that the dtype to compute in is "
                "unknown",
                got=f"`{name}.{param_name}` of {param.dtype}",
                fix="load the weights in the dtype to compute in, such as with "
                "`net.to(torch.bfloat16)`, before `faccel.wrap(net, ctx)`",
            )
        # A number above the largest one would become nan or inf. NaNs of the model are its own.
        largest = param.detach().abs().max().item() if param.numel() else 0.0
        if largest > torch.finfo(dtype).max:
            raise ModelError(
                "a weight is too large for `storage_dtype`",
                got=f"{largest:g} in `{name}.{param_name}`, and {dtype} ends at "
                f"{torch.finfo(dtype).max:g}",
                fix=f'write `faccel.parallel.LayerwiseCasting(skip=("{name}",))`, or store in '
                '`"bfloat16"`',
            )


def _store(layer: nn.Module, dtype: torch.dtype) -> None:
    """Cast the parameters of a layer in place, and register the hooks. Updates `layer`."""
    hooks = _hooks_of(layer)
    if hooks is None:
        dtypes = {name: param.dtype for name, param in layer.named_parameters(recurse=False)}
        hooks = _CastParams(dtypes)
        layer.register_forward_pre_hook(hooks.cast)
        # After an error in forward, too.
        layer.register_forward_hook(hooks.restore, always_call=True)
    for param in layer.parameters(recurse=False):
        # The parameter stays the same object, as with `nn.Module.to`.
        param.data = param.data.to(dtype)


class _CastParams:
    """The hooks of one layer.

    Args:
        dtypes: The dtype in which each parameter takes part in forward outside of autocast.
    """

    def __init__(self, dtypes: Mapping[str, torch.dtype]) -> None:
        self._dtypes = dtypes
        self._stored: dict[str, nn.Parameter] = {}

    def cast(self, layer: nn.Module, args: Tree) -> None:
        """Put cast copies in the places of the parameters."""
        # `setattr` refuses a tensor that is no `nn.Parameter`.
        params = layer._parameters  # pyright: ignore[reportPrivateUsage]
        for name, dtype in self._dtypes.items():
            param = params[name]
            assert param is not None
            if name in self._stored or (param.requires_grad and torch.is_grad_enabled()):
                raise _unsupported_call(name, layer, param)
            device_type = param.device.type
            # Autocast would cast a second time. Where it is off, as in a block in fp32, inputs have
            # the dtype of before.
            if torch.is_autocast_enabled(device_type):
                dtype = torch.get_autocast_dtype(device_type)
            self._stored[name] = param
            # Autograd keeps the copy for the gradient of the input, if an adapter needs it.
            params[name] = param.detach().to(dtype)  # pyright: ignore[reportArgumentType]

    def restore(self, layer: nn.Module, args: Tree, output: Tree) -> None:
        """Put the stored parameters back."""
        params = layer._parameters  # pyright: ignore[reportPrivateUsage]
        # Also after an error in `cast`, which may have replaced some of the parameters only.
        while self._stored:
            name, param = self._stored.popitem()
            params[name] = param


def _unsupported_call(name: str, layer: nn.Module, param: torch.Tensor) -> ModelError:
    if param.requires_grad:
        return ModelError(
            "a layer that is stored in a small dtype has a trainable parameter",
            got=f"`{name}` of {param.dtype} in a {type(layer).__name__}",
            fix="write `with torch.no_grad():` around the call, or `requires_grad_(False)`; leave "
            "`layerwise_casting` out to train the layer",
        )
    return ModelError(
        "two calls of a layer that is stored in a small dtype overlap",
        got=f"a second forward of a {type(layer).__name__} inside of the first",
        fix="run the model in one thread at a time",
    )
