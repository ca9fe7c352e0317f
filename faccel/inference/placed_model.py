"""`PlacedModel`, and `materialize`: from a placed model back to an ordinary module."""

from __future__ import annotations

import attrs
import torch
from torch import nn

from faccel.checks import instance_of
from faccel.context import DistContext
from faccel.effects import consumes, effectful
from faccel.errors import ModelError
from faccel.inference.budget import available_device
from faccel.inference.placement import Placement
from faccel.inference.session import OriginalParam, Session
from faccel.inference.set_tensors import set_buffer, set_param
from faccel.training.module_checks import method_of
from faccel.tree import Tree


@attrs.frozen(eq=False)
class PlacedModel:
    """A model on several devices, in memory and on disk; `place` and `offload` return it.

    `placed(...)` runs `forward`. The module itself can be used, too: `placed.module.generate(...)`.
    It computes without gradients, in one thread at a time.

    Args:
        module: The user's module. Its offloaded parameters are placeholders without memory.
        placement: Where its units are.
        ctx: The context.
        session: The state of the placement, for `materialize`.
    """

    module: nn.Module
    placement: Placement
    ctx: DistContext = attrs.field(repr=False)
    session: Session = attrs.field(repr=False)

    def __call__(self, *args: Tree, **kwargs: Tree) -> Tree:
        return self.call("__call__", *args, **kwargs)

    def call(self, method: str, *args: Tree, **kwargs: Tree) -> Tree:
        """Run a method such as `"generate"`, or a submodule such as `"encoder"`, without gradients.

        Args:
            method: The name of a method or a submodule.
            *args: Its arguments.
            **kwargs: Its keyword arguments.

        Raises:
            ModelError: The module has no such method or submodule, or was materialized.
        """
        self.session.check_open()
        target = method_of(self.module, method)
        # Not `inference_mode`: its tensors could not take part in training later.
        with torch.no_grad():
            return target(*args, **kwargs)


@effectful(consumes("placed"))
def materialize(placed: PlacedModel, *, device: str | torch.device | None = None) -> nn.Module:
    """Return the module with all of its parameters in memory, without hooks.

    Effects: consumes placed. The parameters require gradients as before `place`, and those that had
    memory before are the same objects, so that an optimizer keeps them.

    Args:
        placed: From `place` or `offload`.
        device: Where to; None is the device of the context.

    Raises:
        ModelError: `placed` is none, or was materialized before.
        CheckpointError: A file cannot be read; the model stays placed.

    Examples:
        >>> import tempfile
        >>> from faccel.inference import offload
        >>> from faccel.testing import fake_context
        >>> net = torch.nn.Linear(2, 1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     placed = offload(net, "disk", fake_context(0, 1), folder=folder)
        ...     materialize(placed) is net
        True
    """
    fix = "pass what `faccel.inference.place` returned"
    instance_of("placed", placed, PlacedModel, fix=fix, error=ModelError)
    session = placed.session
    session.check_open()
    # One device: an optimizer needs the parameters of a model together.
    target = placed.ctx.device
    if device is not None:
        target = available_device(device, "device")
    # All before the first is changed, so that an error leaves the model placed.
    values = {key: _value(session, key, target) for key in session.originals}
    for key, original in session.originals.items():
        param = _restored(original, values.pop(key))
        for owner, name in original.owners:
            set_param(owner, name, param)
    for module in session.module.modules():
        for name, buffer in module.named_buffers(recurse=False):
            set_buffer(module, name, buffer.to(target))
    session.close()
    return session.module


def _value(session: Session, key: int, device: torch.device) -> torch.Tensor:
    original = session.originals[key]
    if key not in session.offloaded:
        owner, name = original.owners[0]
        return owner.get_parameter(name).detach().to(device, original.dtype)
    # Read straight to the device, without a second copy in memory.
    values = torch.empty(original.shape, dtype=original.dtype, device=device)
    session.read_range(original.name, values, 0)
    return values


def _restored(original: OriginalParam, values: torch.Tensor) -> nn.Parameter:
    """Return the original parameter with values; a new one if it was on the meta device."""
    if original.param.is_meta:
        return nn.Parameter(values, requires_grad=original.requires_grad)
    original.param.data = values
    original.param.requires_grad_(original.requires_grad)
    return original.param
