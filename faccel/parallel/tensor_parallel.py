"""Tensor and sequence parallel: modules by name pattern, in PyTorch's parallel styles."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
)

from faccel.context import DistContext, require_context
from faccel.errors import ConfigError, ModelError
from faccel.parallel.materialize import tie_parameters, tied_names
from faccel.parallel.units import matching
from faccel.plan import Plan

# The keys are those of `Plan.tensor`. `sequence_*` have inputs or outputs that are sharded over the
# sequence, dim 1.
_STYLES: Mapping[str, Callable[[], ParallelStyle | None]] = {
    "colwise": ColwiseParallel,
    "colwise_gather": lambda: ColwiseParallel(output_layouts=Replicate()),
    "colwise_loss": lambda: ColwiseParallel(use_local_output=False),
    # A norm over single heads: each rank has other heads (dim 0 of a replicated parameter's
    # input), so DTensor sums the gradients over the ranks.
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

# The styles whose parameters every rank has in full.
_REPLICATED = ("heads", "replicate", "sequence")

# Attributes of attention modules that count heads, and that are the width of a head.
_HEAD_COUNTS = (
    "num_heads",
    "n_heads",
    "n_head",
    "num_attention_heads",
    "num_key_value_heads",
    "nhead",
)
_HEAD_WIDTHS = ("head_dim", "attention_head_size")


def styles_of(module: nn.Module, plan: Plan, size: int) -> dict[str, str]:
    """Return the style of each module that the plan shards over `tp`, by name.

    Args:
        module: The model.
        plan: Its `tensor` maps patterns to styles.
        size: The size of the axis `tp`.

    Raises:
        ConfigError: The plan has no styles, a pattern matches nothing or two match one module.
        ModelError: `size` does not divide a module, or a style does not fit it.
    """
    if not plan.tensor:
        raise ConfigError(
            "a mesh with `tp` needs a plan with `tensor`",
            got=f"tp={size}, no `tensor`",
            fix="write "
            '`plan=faccel.Plan(tensor={"blocks.*.up": "colwise", "blocks.*.down": "rowwise"})`',
        )
    modules = dict(module.named_modules())
    # The root has no name that a pattern could match.
    candidates = [name for name in modules if name]
    styles: dict[str, str] = {}
    for pattern, style in plan.tensor.items():
        for name in matching(pattern, candidates, "module"):
            if name in styles:
                raise ConfigError(
                    f"two patterns of `tensor` match the module `{name}`",
                    got=f"`{pattern}`: {style}, and {styles[name]} before",
                    fix="write patterns that match each module once",
                )
            styles[name] = style
            _check_style(name, modules, style, size)
    _check_ties(module, modules, styles)
    return styles


def _check_ties(
    module: nn.Module, modules: Mapping[str, nn.Module], styles: Mapping[str, str]
) -> None:
    """Raise if a tied parameter would be sharded along different dims."""
    for names in tied_names(module):
        dims = {_sharded_dim(name, modules, styles) for name in names}
        if len(dims) > 1:
            described = ", ".join(
                f"`{name}` {styles.get(_parent(name), 'replicated')}" for name in names
            )
            raise ModelError(
                "a tied parameter would be sharded in two ways",
                got=described,
                fix="shard all of its modules along one dim, as in `rowwise_embedding` and "
                "`colwise`, or none of them",
            )


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _sharded_dim(
    param_name: str, modules: Mapping[str, nn.Module], styles: Mapping[str, str]
) -> int | None:
    """Return the dim along which a weight is sharded; None for a replicated one."""
    module_name = _parent(param_name)
    style = styles.get(module_name, "replicate")
    if style in _REPLICATED:
        return None
    return _weight_dim(modules[module_name], style)


def _weight_dim(module: nn.Module, style: str) -> int:
    # The weight of a linear layer is [out, in], that of an embedding [vocabulary, width]: outputs
    # (colwise) are dim 0 of the former and dim 1 of the latter.
    is_colwise = "colwise" in style
    return 0 if is_colwise == isinstance(module, nn.Linear) else 1


def _check_style(name: str, modules: Mapping[str, nn.Module], style: str, size: int) -> None:
    """Raise unless a module can be sharded in this style over `size` ranks."""
    module = modules[name]
    if style in _REPLICATED:
        return
    if not isinstance(module, (nn.Linear, nn.Embedding)):
        # DTensor's styles shard the weights of these two classes only.
        fix = "leave it out, so that it is replicated"
        if any(isinstance(child, (nn.Linear, nn.Embedding)) for child in module.modules()):
            fix = "name the linear layers and embeddings inside it"
        raise ModelError(
            f"`{name}` does not support the style `{style}`",
            got=f"a {type(module).__name__}",
            fix=fix,
        )
    is_colwise = "colwise" in style
    length = module.weight.shape[_weight_dim(module, style)]
    if length % size:
        unit = "columns" if is_colwise else "rows"
        raise ModelError(
            f"tp={size} does not divide `{name}`",
            got=f"{length} {unit}",
            fix=f"use a `tp` that divides {length}, or leave this module out",
        )
    # Only colwise layers produce heads; a rowwise layer after them has the same split of its input.
    if is_colwise:
        _check_heads(name, modules.get(_parent(name)), length, size)


def _check_heads(name: str, parent: nn.Module | None, num_columns: int, size: int) -> None:
    """Raise if ranks would get fractions of attention heads.

    The number of heads is read from the attributes of the module around the layer, if it has any.
    """
    counts: dict[str, object] = {}
    for attribute in _HEAD_COUNTS:
        counts[attribute] = getattr(parent, attribute, None)
    # The layer's own number of heads. With grouped queries, keys have fewer than `num_heads`.
    for attribute in _HEAD_WIDTHS:
        width = getattr(parent, attribute, None)
        if isinstance(width, int) and num_columns % width == 0:
            counts[f"{num_columns} columns / {attribute}"] = num_columns // width
    for description, num_heads in counts.items():
        if isinstance(num_heads, int) and num_heads % size:
            raise ModelError(
                f"tp={size} does not divide the attention heads",
                got=f"{description}={num_heads} of `{_parent(name)}`",
                fix=f"use a `tp` that divides {num_heads}",
            )


def apply_tensor_parallel(module: nn.Module, styles: Mapping[str, str], mesh: DeviceMesh) -> None:
    """Shard modules in their styles. Updates `module`.

    Nothing is communicated, because ranks have the same values.
    """
    from torch.distributed.tensor.parallel import parallelize_module

    # `parallelize_module` replaces parameters by DTensors module by module, which unties them.
    ties = tied_names(module)
    for name, style in styles.items():
        parallel_style = _STYLES[style]()
        if parallel_style is not None:
            submodule = module.get_submodule(name)
            # `src_data_rank=None`: every rank has the full values, so nothing is scattered.
            parallelize_module(submodule, mesh, parallel_style, src_data_rank=None)
    tie_parameters(module, ties)


def loss_parallel(ctx: DistContext) -> AbstractContextManager[None]:
    """Return a context in which `cross_entropy` takes logits with a sharded vocabulary.

    The logits are those of a layer in the style `"colwise_loss"`: no rank has all of them. Run
    both the loss and `scaled_backward` inside. Without tensor parallel it has no effect.

    Effects: pure.

    Args:
        ctx: The context.

    Examples:
        >>> from faccel.testing import fake_context
        >>> with loss_parallel(fake_context(0, 1)):
        ...     pass
    """
    require_context(ctx, "faccel.parallel.loss_parallel(ctx)")
    if ctx.mesh.spec.tp == 1:
        return nullcontext()
    # It registers sharded kernels of `log_softmax` and `nll_loss` with DTensor's dispatcher, and
    # removes them at the end.
    from torch.distributed.tensor.parallel import loss_parallel as torch_loss_parallel

    return torch_loss_parallel()
