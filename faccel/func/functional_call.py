"""A module as a function of its parameters, its buffers and a generator."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict
from torch import nn

from faccel.device_table import is_host
from faccel.effects import effectful, updates
from faccel.errors import ModelError, PurityError
from faccel.func.gradient_transformation import is_traced
from faccel.func.rng_streams import NoGenerator, RandomSource, as_default_generator
from faccel.func.tensordicts import NamedTensors, flat_dict, to_tensordict
from faccel.tree import Tree


@effectful(updates("generator"))
def functional_call(
    model: nn.Module,
    params: TensorDict,
    *args: Any,
    generator: RandomSource | None = None,
    buffers: TensorDict | None = None,
    **kwargs: Any,
) -> Any:
    """Return `model(*args, **kwargs)` computed with these parameters. The model is not changed.

    Effects: updates generator. It advances by what the model draws; without one this is pure.

    Args:
        model: Any `torch.nn.Module`. It provides the code, and every tensor that is not passed.
        params: `state.params`, or the parameters that a loss function receives.
        *args: Arguments of its `forward`.
        generator: Source of random numbers for dropout: the one that a loss function receives.
            Without it, drawing raises PurityError in a step.
        buffers: Buffers to start from, for layers that write to theirs, such as batch norm in
            training mode.
        **kwargs: Keyword arguments of its `forward`.

    Returns:
        The output of the model; with `buffers` the output and the new buffers.

    Raises:
        ModelError: The model has no tensor of a name in `params` or `buffers`.
        PurityError: The model writes to a buffer that was not passed; names it. Or it draws random
            numbers under `torch.compile`, `vmap` or `grad`.

    Examples:
        >>> from faccel.func import functional_call, init_state, sgd
        >>> from faccel.testing import fake_context
        >>> model, x = torch.nn.BatchNorm1d(2), torch.ones(4, 2)
        >>> state = init_state(model, sgd(0.1), fake_context(0, 1), seed=0)
        >>> out, buffers = functional_call(model, state.params, x, buffers=state.buffers)
        >>> int(buffers["num_batches_tracked"]), int(model.num_batches_tracked)
        (1, 0)
    """
    passed_buffers: NamedTensors = {}
    if buffers is not None:
        # layers write to their buffers in place
        passed_buffers = {name: buffer.clone() for name, buffer in flat_dict(buffers).items()}
    tensors = flat_dict(params) | passed_buffers
    # Under a transform, swapping tensors in the module's tables would leak traced tensors.
    if is_traced():
        output = _call_traced(model, tensors, generator, args, kwargs)
        new_buffers = tensors  # torch.func.functional_call replaced its entries
    else:
        output, new_buffers = _call_eager(
            model, tensors, generator, args, kwargs, protect=buffers is None
        )
    if buffers is None:
        return output
    return output, to_tensordict({name: new_buffers[name] for name in passed_buffers})


def _call_traced(
    model: nn.Module,
    tensors: NamedTensors,
    generator: RandomSource | None,
    args: tuple[Tree, ...],
    kwargs: dict[str, Tree],
) -> Tree:
    """Call the model under a transform. Replaces buffers in `tensors` that the model replaced."""
    # A default generator cannot be swapped while tracing, so random layers are found by type.
    if not isinstance(generator, torch.Generator):
        (generator or NoGenerator()).check_model(model)
    with _drawing_from(generator):
        return torch.func.functional_call(model, tensors, args, kwargs)


def _call_eager(
    model: nn.Module,
    tensors: NamedTensors,
    generator: RandomSource | None,
    args: tuple[Tree, ...],
    kwargs: dict[str, Tree],
    *,
    protect: bool,
) -> tuple[Tree, NamedTensors]:
    """Return output and tensors after the call.

    Args:
        model: The module.
        tensors: Its parameters and buffers for this call.
        generator: Source of random numbers.
        args: Arguments of its `forward`.
        kwargs: Keyword arguments of its `forward`.
        protect: Whether writes to the module's own buffers are an error.
    """
    # Read at every call, because a user may change the module between two steps.
    slots, has_buffers = _tensor_slots(model)
    if not (protect and has_buffers):
        return _call_swapped(model, slots, tensors, generator, args, kwargs)
    # The model would write to its own buffers. In training mode, where layers do that, it runs on
    # copies, so that the module stays as it was even though this raises.
    own_buffers: NamedTensors = dict(model.named_buffers())
    call_buffers = own_buffers
    if model.training:
        call_buffers = {name: buffer.detach().clone() for name, buffer in own_buffers.items()}
    # PyTorch counts in-place writes; a replaced buffer has another identity.
    versions = {name: (id(b), b._version) for name, b in call_buffers.items()}
    # `call_buffers` wins over the entries of `tensors`, which has no buffers here.
    output, after = _call_swapped(model, slots, tensors | call_buffers, generator, args, kwargs)
    written: list[str] = []
    for name, version in versions.items():
        buffer = after[name]
        is_written = version != (id(buffer), buffer._version)
        if is_written or (model.training and _differs(buffer, own_buffers[name])):
            written.append(name)
    if written:
        raise PurityError(
            "the model writes to its buffers, which were not passed",
            got=", ".join(f"`{name}`" for name in sorted(written)),
            fix="write `loss_fn(params, batch, generator, buffers)` with "
            "`out, buffers = functional_call(model, params, x, buffers=buffers)` that returns "
            "`(loss, buffers)`, and `make_step(..., has_buffers=True)`; or call `model.eval()`",
        )
    return output, after


def _differs(copy: torch.Tensor, original: torch.Tensor) -> bool:
    """Return whether a copy was written to without a new version, as batch norm does.

    Compares values, on the CPU only: on a device it would wait.
    """
    return is_host(original.device) and not torch.equal(copy, original)


class _Slot(NamedTuple):
    """An entry of a module's table of parameters or buffers."""

    table: dict[str, Tree]
    key: str


_Slots = dict[str, list[_Slot]]
"""The entries of each tensor by its first name; a tied parameter has several."""


def _tensor_slots(model: nn.Module) -> tuple[_Slots, bool]:
    """Return the entries of all tensors of a model, and whether it has buffers."""
    # `named_modules` yields a module once, even if it is used at several places.
    slots: _Slots = {}
    names: dict[int, str] = {}  # of tensors by identity: tied ones have the first name
    has_buffers = False
    for prefix, module in model.named_modules():
        dotted = f"{prefix}." if prefix else ""
        # `named_parameters` would list a tied tensor once
        params: Tree = module._parameters  # pyright: ignore[reportPrivateUsage]
        buffers: Tree = module._buffers  # pyright: ignore[reportPrivateUsage]
        has_buffers = has_buffers or bool(buffers)
        for table in (params, buffers):
            for key, tensor in table.items():
                if tensor is None:
                    continue
                name = names.setdefault(id(tensor), dotted + key)
                slots.setdefault(name, []).append(_Slot(table, key))
    return slots, has_buffers


def _call_swapped(
    model: nn.Module,
    slots: _Slots,
    tensors: Mapping[str, torch.Tensor],
    generator: RandomSource | None,
    args: tuple[Tree, ...],
    kwargs: dict[str, Tree],
) -> tuple[Tree, NamedTensors]:
    """Return the output of the model with `tensors` swapped in, and these after the call.

    The model's own tensors are restored. `torch.func.functional_call` does the same in four passes
    over the modules, which take a tenth of a small step.
    """
    originals: list[tuple[_Slot, Tree]] = []
    try:
        for name, tensor in tensors.items():
            if name not in slots:
                raise ModelError(
                    "the model has no parameter or buffer of this name",
                    got=f"`{name}`",
                    fix="pass the model that `init_state` made the state of",
                )
            for slot in slots[name]:
                # Appended before the swap, so that `finally` restores all that was swapped.
                originals.append((slot, slot.table[slot.key]))
                slot.table[slot.key] = tensor
        with _drawing_from(generator):
            output = model(*args, **kwargs)
        after: NamedTensors = {}
        for name in tensors:
            slot = slots[name][0]
            after[name] = slot.table[slot.key]
        return output, after
    # Also after an exception: the module must never stay with the tensors of a call.
    finally:
        for slot, tensor in originals:
            slot.table[slot.key] = tensor


def _drawing_from(generator: RandomSource | None) -> AbstractContextManager[object]:
    if isinstance(generator, torch.Generator):
        return as_default_generator(generator)
    # Without a generator, draws change the default one, which the step detects.
    return nullcontext()
