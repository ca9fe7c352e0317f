"""Whether a module is one that Megatron-core has built under the groups of the context."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from faccel.context import DistContext
from faccel.errors import ConfigError, ModelError
from faccel.plan import Plan


def chunks_of(module: nn.Module) -> list[Any]:
    """Return the model chunks of a rank: the module, or those of a `ModuleList`.

    Effects: pure.

    Raises:
        ModelError: Megatron-core did not build one of them.
    """
    chunks: list[nn.Module] = [module]
    if isinstance(module, nn.ModuleList):
        chunks = list(module)
    cls: Any = importlib.import_module("megatron.core.transformer.module").MegatronModule
    for chunk in chunks:
        if not isinstance(chunk, cls):
            raise ModelError(
                "the strategy `megatron` runs modules that Megatron-core has built",
                got=f"a {type(chunk).__module__}.{type(chunk).__name__}",
                fix="build a `megatron.core.models.gpt.GPTModel` after `faccel.init`, or leave "
                '`strategy="megatron"` out for a module of PyTorch',
            )
        # Its DDP, its FSDP and `Float16Module` have the model in this attribute.
        if isinstance(getattr(chunk, "module", None), nn.Module):
            raise ModelError(
                "`wrap` puts the model into the wrappers of Megatron-core itself",
                got=f"a {type(chunk).__name__} around a {type(chunk.module).__name__}",
                fix="pass the model inside: `faccel.wrap(net.module, ctx)`",
            )
    return chunks


def check_plan(plan: Plan) -> None:
    """Raise for a plan with options, which the model's `TransformerConfig` has instead.

    Raises:
        ConfigError: It has one.
    """
    if plan != Plan():
        raise ConfigError(
            "a `Plan` is unsupported under Megatron-core, whose models are sharded when they are "
            "built",
            got=str(plan),
            fix="leave `plan` out; parallel sizes are in the mesh, and recomputation and fp8 are "
            "fields of `TransformerConfig`",
        )


def check_chunks(chunks: Sequence[Any], ctx: DistContext) -> None:
    """Raise unless the chunks were built for the mesh and the precision of the context.

    Raises:
        ModelError: Their configuration differs, or faccel does not support it.
    """
    spec = ctx.mesh.spec
    for chunk in chunks:
        config = chunk.config
        _check_field(config, "tensor_model_parallel_size", spec.tp, f"tp={spec.tp}")
        _check_field(config, "pipeline_model_parallel_size", spec.pp, f"pp={spec.pp}")
        _check_field(config, "context_parallel_size", 1, "no axis `cp`")
        _check_field(config, "num_moe_experts", None, "no experts")
        _check_field(config, "fp16", False, "fp16 is unsupported")
        precision = ctx.config.mixed_precision
        _check_field(config, "bf16", precision == "bf16", f"mixed_precision={precision}")
        # With it the DDP would add gradients up instead of averaging them.
        _check_field(config, "calculate_per_token_loss", False, "`faccel.windows(weight=...)`")
        # `wrap` must not change the user's configuration, and the schedule would call these, too.
        for name in ("finalize_model_grads_func", "grad_scale_func", "no_sync_func"):
            _check_field(config, name, None, "faccel calls it")
        _check_parameters(chunk)
    num_virtual = chunks[0].config.virtual_pipeline_model_parallel_size
    if num_virtual is not None or len(chunks) > 1:
        raise ModelError(
            "several model chunks on a rank are unsupported",
            got=f"{len(chunks)} chunks, virtual_pipeline_model_parallel_size={num_virtual}",
            fix="leave `virtual_pipeline_model_parallel_size` out",
        )


def _check_field(config: Any, name: str, expected: object, source: str) -> None:
    value = getattr(config, name, expected)
    if value != expected:
        raise ModelError(
            f"`{name}` of the model's configuration contradicts the context",
            got=f"{name}={value}, {source}",
            fix=f"write `TransformerConfig({name}={expected})`",
        )


def _check_parameters(chunk: nn.Module) -> None:
    for name, param in chunk.named_parameters():
        if param.is_meta:
            raise ModelError(
                "a model on the meta device is unsupported under Megatron-core",
                got=f"`{name}` on meta",
                fix="build it without `init_model_with_meta_device`",
            )
        if param.dtype not in (torch.float32, torch.bfloat16):
            raise ModelError(
                "Megatron-core trains parameters in fp32 or bf16",
                got=f"`{name}`, {param.dtype}",
                fix="write `TransformerConfig(params_dtype=torch.float32)`",
            )
