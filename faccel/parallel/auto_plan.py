"""An initial plan, proposed from a model's attributes and structure."""

from __future__ import annotations

import re
from collections.abc import Mapping

import attrs
from torch import nn

from faccel.context import DistContext, require_context
from faccel.errors import FaccelError, ModelError, short_repr
from faccel.parallel.pipeline_stages import chain_of, is_loss, stages_of
from faccel.parallel.trace_chain import why_not_chain
from faccel.parallel.units import matches
from faccel.plan import PipelineConfig, Plan
from faccel.training.model import WrappedModel

_STYLES = {
    "colwise": "colwise",
    "colwise_rep": "colwise_gather",
    "colwise_gather_output": "colwise_gather",
    "embedding_colwise": "colwise_gather",
    "embedding_rowwise": "rowwise_embedding",
    "replicate": "replicate",
    "replicated_with_grad_allreduce": "heads",
    "rowwise": "rowwise",
    "rowwise_rep": "rowwise_split",
    "rowwise_split_input": "rowwise_split",
    "vocab_parallel_rowwise": "rowwise_embedding",
}
"""The styles of transformers' `tp_plan`, and their names in `Plan.tensor`."""

# Styles of modules whose experts are bare parameters: they stay replicated.
_REPLICATED_STYLES = ("moe_identity_expert", "moe_tp_experts")

# A model without blocks is split into about this many units.
_NUM_UNITS = 8


def plan_for(model: nn.Module, ctx: DistContext) -> Plan:
    """Propose a plan for a model on the mesh of `ctx`.

    Print it, change it with `attrs.evolve`, and pass it to `wrap`.

    The units are the model's `_no_split_modules`, or else the members of its module lists, or else
    modules with an eighth of the parameters. With `tp`, the styles are those of transformers'
    `tp_plan`, and of the two linear layers of each `nn.Transformer*Layer`. Bare parameters, such
    as fused experts, stay replicated. With `pp`, the chain is the model's children in the order of
    registration; a symbolic trace checks that `forward` passes its input through them. For a
    decoder of transformers, whose blocks take masks and positions, the stages run its forward
    without the blocks of other stages (`PipelineConfig(forward="model")`).

    Effects: pure.

    Args:
        model: A module that is not wrapped.
        ctx: The context.

    Raises:
        ModelError: `model` is wrapped. Or the mesh has `tp`, and the model has no known modules to
            split or its `tp_plan` has an unsupported style. Or it has `pp`, and the model's forward
            is not a chain of its children, is not traceable, or has too few modules.

    Examples:
        >>> from faccel.testing import fake_context
        >>> layer = nn.TransformerEncoderLayer(8, 2)
        >>> layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        >>> dict(plan_for(layers, fake_context(0, 2, mesh="tp=2")).tensor)
        {'layers.*.linear1': 'colwise', 'layers.*.linear2': 'rowwise'}
    """
    require_context(ctx, "faccel.parallel.plan_for(model, ctx)")
    if isinstance(model, WrappedModel):
        raise ModelError(
            "`plan_for` expects a model that is not wrapped",
            got="a WrappedModel",
            fix="pass your module, before `faccel.wrap`",
        )
    # `Plan()` finds the blocks itself; only a model without blocks needs a size.
    plan = Plan()
    if not _has_blocks(model):
        num_params = sum(param.numel() for param in model.parameters())
        plan = attrs.evolve(plan, units=max(1, num_params // _NUM_UNITS))
    spec = ctx.mesh.spec
    if spec.tp > 1:
        plan = attrs.evolve(plan, tensor=_tensor_styles(model))
    if spec.pp > 1:
        plan = attrs.evolve(plan, pipeline=_pipeline(model, spec.pp))
    return plan


def _has_blocks(model: nn.Module) -> bool:
    if getattr(model, "_no_split_modules", None):
        return True
    return any(isinstance(module, nn.ModuleList) for module in model.modules())


def _tensor_styles(model: nn.Module) -> dict[str, str]:
    styles: dict[str, str] = {}
    # transformers 5 has the merged plan of all submodules as `tp_plan`, version 4 as `_tp_plan`.
    tp_plan = getattr(model, "tp_plan", None) or getattr(model, "_tp_plan", None)
    if isinstance(tp_plan, Mapping):
        styles = _translate(model, tp_plan)
    # Only the feed-forward part: the projection of their attention is fused over q, k and v.
    for name, module in model.named_modules():
        if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
            prefix = _pattern_prefix(name)
            styles |= {f"{prefix}linear1": "colwise", f"{prefix}linear2": "rowwise"}
    if not styles:
        raise ModelError(
            "`plan_for` finds no module of this model to split over `tp`",
            got=f"a {type(model).__name__} without `tp_plan` or `nn.Transformer*Layer`",
            fix="write "
            '`faccel.Plan(tensor={"blocks.*.up": "colwise", "blocks.*.down": "rowwise"})`',
        )
    return styles


def _pattern_prefix(name: str) -> str:
    """Return `"layers.*."` for `"layers.0"`, and `""` for the root."""
    if not name:
        return ""
    # Indices become `*`, so that one pattern matches the layers of a list.
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name) + "."


def _translate(model: nn.Module, tp_plan: Mapping[str, str]) -> dict[str, str]:
    """Return the styles of transformers' plan under the names of `Plan.tensor`."""
    names = list(dict(model.named_modules()))
    styles: dict[str, str] = {}
    for pattern, style in tp_plan.items():
        # A pattern without a match is for a bare parameter, or for another configuration.
        if style in _REPLICATED_STYLES or not matches(pattern, names):
            continue
        if style not in _STYLES:
            raise ModelError(
                "the model's `tp_plan` has an unsupported style",
                got=f"`{pattern}`: {short_repr(style)} of a {type(model).__name__}",
                fix="name the modules to split yourself, as in `faccel.Plan(tensor={...})`, or "
                "use another mesh",
            )
        styles[pattern] = _STYLES[style]
    return styles


def _pipeline(model: nn.Module, num_stages: int) -> PipelineConfig:
    """Return a pipeline that `wrap` accepts and whose stages compute what the model does."""
    config = PipelineConfig(chain=_chain(model))
    try:
        chain = chain_of(model, config)
        stages_of(model, config, num_stages)
        reason = why_not_chain(model, chain)
    except FaccelError as error:
        reason = f"{error.problem}, {error.got}"
    if reason is None:
        return config
    decoder = _decoder(model, num_stages)
    if decoder is not None:
        return decoder
    raise ModelError(
        "`plan_for` finds no pipeline for this model",
        got=f"a {type(model).__name__}: {reason}",
        fix="use a mesh without `pp`, such as `dp_shard=-1`. Or rewrite forward as a chain of "
        "modules, and name them: `faccel.Plan(pipeline=faccel.parallel.PipelineConfig("
        'chain=("embed", "blocks.*", "head")))`',
    )


def _decoder(model: nn.Module, num_stages: int) -> PipelineConfig | None:
    """Return a pipeline whose stages run the forward of a model of transformers, or None.

    What a trace cannot show, the first forward of each stage checks.
    """
    blocks = _list_of_blocks(model)
    # Two lists, such as of an encoder and a decoder, are not one chain.
    if blocks is None or getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None
    # In the order of registration: models of transformers register modules as forward runs them.
    config = PipelineConfig(chain=tuple(_around(model, blocks, "")), forward="model")
    try:
        stages_of(model, config, num_stages)
    except FaccelError:
        return None
    return config


def _list_of_blocks(model: nn.Module) -> nn.ModuleList | None:
    """Return the only list of the modules that the model must not be split in."""
    classes = getattr(model, "_no_split_modules", None) or ()
    lists: list[nn.ModuleList] = []
    for module in model.modules():
        if not isinstance(module, nn.ModuleList) or len(module) == 0:
            continue
        if all(type(member).__name__ in classes for member in module):
            lists.append(module)
    if len(lists) != 1:
        return None
    return lists[0]


def _around(module: nn.Module, blocks: nn.ModuleList, prefix: str) -> list[str]:
    """Return the patterns of the blocks, and of the modules with parameters before and after."""
    chain: list[str] = []
    for name, child in module.named_children():
        if child is blocks:
            chain.append(f"{prefix}{name}.*")
        # A container of the blocks, such as the model below its head.
        elif any(submodule is blocks for submodule in child.modules()):
            chain += _around(child, blocks, f"{prefix}{name}.")
        elif next(child.parameters(), None) is not None:
            chain.append(f"{prefix}{name}")
    return chain


def _chain(model: nn.Module) -> tuple[str, ...]:
    # Losses among the children are not part of the forward of the pipeline.
    chain: list[str] = []
    for name, child in model.named_children():
        if isinstance(child, nn.ModuleList):
            chain.append(f"{name}.*")
        elif not is_loss(child):
            chain.append(name)
    return tuple(chain)
