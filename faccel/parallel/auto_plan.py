"""A plan to begin with, from what a model says of itself and from its structure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from faccel.context import DistContext
from faccel.errors import ModelError
from faccel.parallel.pipeline_stages import is_loss
from faccel.parallel.units import means
from faccel.plan import PipelineConfig, Plan
from faccel.training.model import WrappedModel

_THEIRS = {
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
"""The styles of transformers' `tp_plan`, under our names."""

_UNCUT = (
    "moe_identity_expert",
    "moe_tp_experts",
)  # around experts that are parameters, of which each rank has all

_SHARE = 8  # a model without blocks is cut into about so many units


def plan_for(model: nn.Module, ctx: DistContext) -> Plan:
    """Propose a plan for a model on the mesh of `ctx`: print it, change it with `attrs.evolve`, and give it to `wrap`.

    Units are the model's own `_no_split_modules`, else the members of its module lists, else modules with an eighth of
    the parameters. Under `tp` the cuts are those of transformers' `tp_plan` (of what it says about bare parameters, as
    of fused experts, nothing: each rank has them whole), and the two linear layers of each of torch's transformer
    layers. Under `pp` the chain is that of the model's children, in the order in which they were
    registered: check that its forward passes them so.

    Effects: pure.

    Args:
        model: Not wrapped yet.
        ctx: The world.

    Raises:
        ModelError: The mesh has `tp`, and nothing of the model is known to be cut, or its `tp_plan` has a style that
            faccel has not; or `model` is wrapped.

    Examples:
        >>> from faccel.testing import fake_context
        >>> layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2), 2, enable_nested_tensor=False)
        >>> dict(plan_for(layers, fake_context(0, 2, mesh="tp=2")).tensor)
        {'layers.*.linear1': 'colwise', 'layers.*.linear2': 'rowwise'}
    """
    if isinstance(model, WrappedModel):
        raise ModelError(
            "a plan is made before a model is wrapped",
            got="a WrappedModel",
            fix="pass your own module",
        )
    spec = ctx.mesh.spec
    options: dict[str, Any] = {}
    if not getattr(model, "_no_split_modules", None) and not any(
        isinstance(m, nn.ModuleList) for m in model.modules()
    ):
        options["units"] = max(1, sum(p.numel() for p in model.parameters()) // _SHARE)
    if spec.tp > 1:
        options["tensor"] = _cuts(model)
    if spec.pp > 1:
        options["pipeline"] = PipelineConfig(chain=_chain(model))
    return Plan(**options)


def _cuts(model: nn.Module) -> dict[str, str]:
    theirs = getattr(model, "tp_plan", None) or getattr(model, "_tp_plan", None)
    found = _translated(model, theirs) if isinstance(theirs, Mapping) else {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
            base = (
                ".".join("*" if part.isdecimal() else part for part in name.split(".")) + "."
                if name
                else ""
            )
            found |= {f"{base}linear1": "colwise", f"{base}linear2": "rowwise"}
    if not found:
        raise ModelError(
            "nothing of this model is known to be cut",
            got=f"a {type(model).__name__} without `tp_plan` or torch's transformer layers",
            fix='write `faccel.Plan(tensor={"blocks.*.up": "colwise", "blocks.*.down": "rowwise"})`',
        )
    return found


def _translated(model: nn.Module, theirs: Mapping[str, str]) -> dict[str, str]:
    names = [name for name, _ in model.named_modules()]
    found: dict[str, str] = {}
    for pattern, style in theirs.items():
        if style in _UNCUT or not means(
            pattern, names
        ):  # a bare parameter, or what another configuration has
            continue
        if style not in _THEIRS:
            raise ModelError(
                "the model's `tp_plan` cuts a module in a way that faccel cannot",
                got=f"`{pattern}`: {style!r} of a {type(model).__name__}",
                fix="name the modules that can be cut yourself, as in `faccel.Plan(tensor={...})`, or use another mesh",
            )
        found[pattern] = _THEIRS[style]
    return found


def _chain(model: nn.Module) -> tuple[str, ...]:
    children = [(name, child) for name, child in model.named_children() if not is_loss(child)]
    return tuple(
        f"{name}.*" if isinstance(child, nn.ModuleList) else name for name, child in children
    )
