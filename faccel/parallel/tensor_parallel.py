"""Tensor and sequence parallel: modules cut by name pattern, with torch's own styles."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
)

from faccel.context import DistContext
from faccel.errors import ConfigError, ModelError
from faccel.parallel.materialize import tie_parameters, tied_names
from faccel.parallel.units import matching
from faccel.plan import Plan

_STYLES: Mapping[str, Callable[[], ParallelStyle | None]] = {
    "colwise": ColwiseParallel,
    "colwise_gather": lambda: ColwiseParallel(output_layouts=Replicate()),
    "colwise_loss": lambda: ColwiseParallel(use_local_output=False),
    # each rank sees other rows of it, here those of its heads, so that the gradients of all of them are added
    "heads": lambda: SequenceParallel(sequence_dim=0, use_local_output=True),
    "replicate": lambda: None,
    "rowwise": RowwiseParallel,
    "rowwise_embedding": lambda: RowwiseParallel(input_layouts=Replicate()),
    "rowwise_split": lambda: RowwiseParallel(input_layouts=Replicate()),
    "sequence": SequenceParallel,
    "sequence_colwise": lambda: ColwiseParallel(input_layouts=Shard(1)),
    "sequence_colwise_gather": lambda: ColwiseParallel(
        input_layouts=Shard(1), output_layouts=Replicate()
    ),
    "sequence_colwise_loss": lambda: ColwiseParallel(
        input_layouts=Shard(1), use_local_output=False
    ),
    "sequence_embedding": lambda: RowwiseParallel(
        input_layouts=Replicate(), output_layouts=Shard(1)
    ),
    "sequence_rowwise": lambda: RowwiseParallel(output_layouts=Shard(1)),
}
_CUT_OUTPUT = ("colwise", "colwise_gather", "colwise_loss")
_HEADS = ("num_heads", "n_heads", "n_head", "num_attention_heads", "num_key_value_heads", "nhead")
_HEAD_WIDTHS = ("head_dim", "attention_head_size")
_WHOLE = ("heads", "replicate", "sequence")  # a rank has all of such a module's parameters


def styles_of(module: nn.Module, plan: Plan, size: int) -> dict[str, str]:
    """Return the style of each module that the plan cuts, by name.

    Raises:
        ConfigError: The plan cuts nothing, a pattern means nothing or two mean one module.
        ModelError: A module cannot be cut into `size` parts, or not like this.
    """
    if not plan.tensor:
        fix = 'write `plan=faccel.Plan(tensor={"blocks.*.up": "colwise", "blocks.*.down": "rowwise"})`'
        raise ConfigError(
            "tensor parallelism needs a plan that says how modules are cut",
            got=f"tp={size}",
            fix=fix,
        )
    named = dict(module.named_modules())
    found: dict[str, str] = {}
    for pattern, style in plan.tensor.items():
        for name in matching(pattern, [name for name in named if name], "module"):
            if name in found:
                got = f"`{pattern}`: {style}, and {found[name]} before"
                raise ConfigError(
                    f"two patterns of `tensor` mean the module `{name}`", got=got, fix="narrow one"
                )
            found[name] = style
            _check(name, named, style, size)
    for names in tied_names(module):
        if len({_dim(named, name, found) for name in names}) > 1:
            got = ", ".join(
                f"`{name}` {found.get(name.rpartition('.')[0], 'not cut')}" for name in names
            )
            fix = "cut all of its places alike, as in `rowwise_embedding` and `colwise`, or none"
            raise ModelError(
                "a parameter that two modules share is cut in two ways", got=got, fix=fix
            )
    return found


def _dim(named: Mapping[str, nn.Module], parameter: str, styles: Mapping[str, str]) -> int | None:
    """Return the dimension along which a weight is cut; None for one that is whole on each rank."""
    name = parameter.rpartition(".")[0]
    style = styles.get(name, "replicate")
    if style in _WHOLE:
        return None
    return int(("colwise" in style) != isinstance(named[name], nn.Linear))


def _check(name: str, named: Mapping[str, nn.Module], style: str, size: int) -> None:
    module = named[name]
    if style in _WHOLE:
        return
    if not isinstance(module, (nn.Linear, nn.Embedding)):
        inside = any(isinstance(each, (nn.Linear, nn.Embedding)) for each in module.modules())
        fix = (
            "name the linear layers and embeddings inside of it"
            if inside
            else "leave it out: each rank has it whole"
        )
        raise ModelError(
            f"`{name}` cannot be cut as `{style}`", got=f"a {type(module).__name__}", fix=fix
        )
    rows = "colwise" in style
    weight = module.weight  # of a linear layer [out, in], of an embedding [number, width]
    cut = weight.shape[0 if rows == isinstance(module, nn.Linear) else 1]
    if cut % size:
        fix = f"use a `tp` that divides {cut}, or leave this module out"
        raise ModelError(
            f"tp={size} does not divide `{name}`",
            got=f"{cut} {'columns' if rows else 'rows'}",
            fix=fix,
        )
    if rows:
        _check_heads(name, named.get(name.rpartition(".")[0]), cut, size)


def _check_heads(name: str, parent: nn.Module | None, columns: int, size: int) -> None:
    """Refuse to cut attention inside of a head, as far as the module around a layer says what its heads are."""
    counts = {each: getattr(parent, each, None) for each in _HEADS}
    for each in _HEAD_WIDTHS:
        width = getattr(parent, each, None)
        if isinstance(width, int) and columns % width == 0:
            counts[f"{columns} columns / {each}"] = columns // width
    for what, heads in counts.items():
        if isinstance(heads, int) and heads % size:
            fix = f"use a `tp` that divides {heads}"
            got = f"{what}={heads} of `{name.rpartition('.')[0]}`"
            raise ModelError(f"tp={size} does not divide the heads of attention", got=got, fix=fix)


def apply_tensor_parallel(module: nn.Module, styles: Mapping[str, str], mesh: DeviceMesh) -> None:
    """Cut the modules. Updates `module`; nothing is communicated, because ranks hold the same values."""
    from torch.distributed.tensor.parallel import parallelize_module

    ties = tied_names(module)
    for name, style in styles.items():
        made: Any = _STYLES[style]()
        if made is not None:
            parallelize_module(module.get_submodule(name), mesh, made, src_data_rank=None)
    tie_parameters(module, ties)  # which torch unties


def loss_parallel(ctx: DistContext) -> AbstractContextManager[None]:
    """Make a context in which `cross_entropy` takes logits whose vocabulary is cut by the style `"colwise_loss"`.

    Forward of the loss and `scaled_backward` both belong inside. No rank ever has all logits. Without tensor parallel
    it does nothing.

    Effects: pure.

    Args:
        ctx: The world.

    Examples:
        >>> from faccel.testing import fake_context
        >>> with loss_parallel(fake_context(0, 1)):
        ...     pass
    """
    if ctx.mesh.spec.tp == 1:
        return nullcontext()
    from torch.distributed.tensor.parallel import loss_parallel as torchs

    return torchs()
