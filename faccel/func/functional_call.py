"""A module as a function of its parameters, its buffers and a generator."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from tensordict import TensorDict
from torch import nn

from faccel.effects import effectful, updates
from faccel.errors import ModelError, PurityError
from faccel.func.gradient_transformation import is_traced
from faccel.func.rng_streams import NoStream, Stream, drawing_from
from faccel.func.tensordicts import named, tensordict


@effectful(updates("generator"))
def functional_call(
    model: nn.Module,
    params: TensorDict,
    *args: Any,
    generator: Stream | None = None,
    buffers: TensorDict | None = None,
    **kwargs: Any,
) -> Any:
    """Run `model(*args, **kwargs)` with these parameters, as a function: the model itself is never changed.

    Effects: updates generator. It moves on; without one it is pure.

    Args:
        model: Any module of torch's; it gives the code, and what is not passed: constants.
        params: `state.params`, or what a loss function was given.
        *args: Of its `forward`.
        generator: What its dropout draws from: the one that a loss function was given. Without one, drawing is an
            error of the step.
        buffers: The buffers to start from, for layers that write to theirs, such as batch norm in training mode.
        **kwargs: Of its `forward`.

    Returns:
        What the model returned; with `buffers` that and the new buffers.

    Raises:
        ModelError: A name that the model does not have.
        PurityError: It writes to a buffer that was not passed; names it. Or a generator cannot be had here: inside of
            `torch.compile`, `vmap` and `grad` of your own.

    Examples:
        >>> from faccel.func import functional_call, init_state, sgd
        >>> from faccel.testing import fake_context
        >>> model = torch.nn.BatchNorm1d(2)
        >>> state = init_state(model, sgd(0.1), fake_context(0, 1), seed=0)
        >>> out, buffers = functional_call(model, state.params, torch.ones(4, 2), buffers=state.buffers)
        >>> int(buffers["num_batches_tracked"]), int(model.num_batches_tracked)
        (1, 0)
    """
    held = named(params)
    passed = (
        {} if buffers is None else {name: each.clone() for name, each in named(buffers).items()}
    )
    if is_traced():
        if not isinstance(generator, torch.Generator):
            (generator or NoStream()).check(model)
        tensors = held | passed
        with _drawing(generator):
            result = torch.func.functional_call(
                model, tensors, args, kwargs
            )  # which updates what it was given
        return (
            result
            if buffers is None
            else (result, tensordict({name: tensors[name] for name in passed}))
        )
    places, has_buffers = _places(model)
    kept: dict[str, torch.Tensor] = {}
    if (
        has_buffers and buffers is None
    ):  # the model's own: copied where layers may well write to them
        copies = model.training
        kept = {name: b.detach().clone() if copies else b for name, b in model.named_buffers()}
    versions = {name: (id(each), each._version) for name, each in kept.items()}
    own = dict(model.named_buffers()) if kept and model.training else {}
    result, after = _run(model, places, held | passed | kept, generator, args, kwargs)
    written = sorted(
        name
        for name in kept
        if versions[name] != (id(after[name]), after[name]._version)
        or _differs(after[name], own.get(name))
    )
    if written:
        raise PurityError(
            "the model writes to its buffers, which were not passed",
            got=", ".join(f"`{name}`" for name in written),
            fix="write `loss_fn(params, batch, generator, buffers)` with "
            "`out, buffers = functional_call(model, params, x, buffers=buffers)` that returns `(loss, buffers)`, and "
            "`make_step(..., has_buffers=True)`; or call `model.eval()`",
        )
    return (
        result if buffers is None else (result, tensordict({name: after[name] for name in passed}))
    )


def _differs(copied: torch.Tensor, own: torch.Tensor | None) -> bool:
    """Whether a copy was written to as batch norm does it, which no version tells; looked for on the CPU only."""
    return own is not None and own.device.type == "cpu" and not torch.equal(copied, own)


_Places = dict[str, list[tuple[dict[str, Any], str]]]


def _places(model: nn.Module) -> tuple[_Places, bool]:
    """Return where each tensor of a model stands, tied ones in several places, and whether there are buffers."""
    places: _Places = {}
    names: dict[int, str] = {}
    has_buffers = False
    for prefix, module in model.named_modules():
        start = f"{prefix}." if prefix else ""
        for table in (module._parameters, module._buffers):  # pyright: ignore[reportPrivateUsage]
            for leaf, tensor in table.items():
                if tensor is not None:
                    places.setdefault(names.setdefault(id(tensor), start + leaf), []).append(
                        (table, leaf)
                    )
        has_buffers = has_buffers or bool(module._buffers)  # pyright: ignore[reportPrivateUsage]
    return places, has_buffers


def _run(
    model: nn.Module,
    places: _Places,
    tensors: dict[str, torch.Tensor],
    generator: Any,
    args: Any,
    kwargs: Any,
) -> tuple[Any, dict[str, torch.Tensor]]:
    """Return what the model gives with `tensors` in place of its own, which are put back, and what stands there then.

    `torch.func.functional_call` does the same in four walks over the model, a tenth of a small step.
    """
    own: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for name, tensor in tensors.items():
            if name not in places:
                raise ModelError(
                    "the model has no such tensor",
                    got=f"`{name}`",
                    fix="pass the model of this state",
                )
            for table, leaf in places[name]:
                own.append((table, leaf, table[leaf]))
                table[leaf] = tensor
        with _drawing(generator):
            result = model(*args, **kwargs)
        return result, {name: places[name][0][0][places[name][0][1]] for name in tensors}
    finally:
        for table, leaf, tensor in own:
            table[leaf] = tensor


def _drawing(generator: Any) -> AbstractContextManager[object]:
    return drawing_from(generator) if isinstance(generator, torch.Generator) else nullcontext()
