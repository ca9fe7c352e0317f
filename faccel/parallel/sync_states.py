"""Equal models on several ranks: the same structure, and rank 0's values."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch
from torch import nn

from faccel.call_site import describe_ranks
from faccel.comm.objects import gather_json
from faccel.comm.tensors import broadcast
from faccel.context import DistContext
from faccel.errors import ModelError
from faccel.tree import has_inner_tensors


def check_same_structure(module: nn.Module, ctx: DistContext, axis: str) -> None:
    """Raise on every rank of the axis if ranks have built different models. Collective.

    Raises:
        ModelError: Names, shapes, dtypes or `requires_grad` differ.
    """
    structure = [
        (name, tuple(param.shape), str(param.dtype), param.requires_grad)
        for name, param in module.named_parameters()
    ]
    # A checksum, because the structure of a large model would be megabytes on every rank. Not
    # `hash`, which differs between processes.
    digests = gather_json(zlib.crc32(repr(structure).encode()), ctx, axis=axis)
    distinct = sorted(set(digests))
    if len(distinct) > 1:
        models = {rank: f"model {distinct.index(digest)}" for rank, digest in enumerate(digests)}
        name, shape, *_ = structure[0]
        raise ModelError(
            "ranks have built different models",
            got=f"{describe_ranks(models)}; this rank's has {len(structure)} parameters, the first "
            f"`{name}` {list(shape)}",
            fix="build the same model, with the same parameters frozen, on every rank",
        )


def broadcast_from_rank_0(values: Mapping[str, torch.Tensor], ctx: DistContext, axis: str) -> None:
    """Overwrite tensors with those of rank 0 of the axis. Updates `values`; collective."""
    plain = plain_tensors(values)
    # Parameters that require gradients cannot be written in place otherwise.
    with torch.no_grad():
        for name, value in broadcast(plain, ctx, axis=axis).items():
            plain[name].copy_(value)


def plain_tensors(values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors, and in place of a quantized one those that it consists of, by name.

    Effects: pure.
    """
    plain: dict[str, torch.Tensor] = {}
    for name, value in values.items():
        if has_inner_tensors(value):
            names, _ = value.__tensor_flatten__()  # type: ignore[attr-defined]
            plain |= plain_tensors({f"{name}.{inner}": getattr(value, inner) for inner in names})
        else:
            plain[name] = value
    return plain


def check_same_values(module: nn.Module, ctx: DistContext, axis: str) -> None:
    """Raise on every rank of the axis if parameters of replicas differ. Collective.

    One all-reduce of two numbers per parameter, for which the host waits.

    Raises:
        ModelError: A parameter differs; names the first one.
    """
    names: list[str] = []
    digests: list[torch.Tensor] = []
    for name, tensor in plain_tensors(dict(module.named_parameters())).items():
        names.append(name)
        digests.append(_digest(tensor.detach()).to(ctx.device))
    # max(x) == -max(-x) where all ranks have the same x. Integers: NaN equals itself.
    own = torch.stack(digests)
    ctx.comm.set_call_label("optimizer_step", own)
    both = ctx.comm.all_reduce(torch.cat([own, -own]), "max", axis)
    differs = both[: len(names)] != -both[len(names) :]
    if not differs.any().item():
        return
    first = int(differs.int().argmax().item())
    raise ModelError(
        "the parameters of the replicas differ",
        got=f"`{names[first]}` and {int(differs.sum().item()) - 1} more",
        fix="change parameters on every rank in the same way, or write "
        "`model = faccel.rewrap(model, ctx)` afterwards, which copies rank 0's",
    )


# An integer type for each size of an element.
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _digest(tensor: torch.Tensor) -> torch.Tensor:
    """Return the sum of the bits of all elements as integers, `int64[]`."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    bits = tensor.contiguous().view(_INTEGERS[tensor.element_size()])
    return bits.sum(dtype=torch.int64)
