"""DeepSpeed's own configuration, made of ours, the user's JSON and the model: what contradicts is an error."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from faccel.context import DistContext
from faccel.errors import ConfigError, nearest
from faccel.plan import DeepSpeedConfig, Plan

AUTO = "auto"
_ELSEWHERE = {
    "scheduler": "pass it to `faccel.optimizer_step(..., scheduler=...)`",
    "managed_gradient_accumulation": "`faccel.windows` decides when gradients are complete",
    "tensor_parallel": "use a mesh with `tp`",
    "pipeline": "use a mesh with `pp`",
    "sequence_parallel_size": "use a mesh with `cp`",
    "data_parallel_size": "start as many processes as you want",
    "expert_parallel": "use a mesh with `ep`",
    "torch_autocast": "use `mixed_precision`",
    "compile": "use `faccel.Plan(compile=...)`",
    "checkpoint": "`faccel.save` writes checkpoints",
    "data_types": "use `mixed_precision`",
    "amp": "use `mixed_precision`",
}
"""Keys of DeepSpeed's whose business is another's here, and whose."""

_KEYS = (
    "activation_checkpointing", "aio", "bf16", "bfloat16", "comms_logger", "communication_data_type", "csv_monitor",
    "disable_python_gc", "dump_state", "flops_profiler", "fp16", "gradient_accumulation_steps",
    "gradient_allreduce_op", "gradient_clipping", "gradient_predivide_factor", "log_level", "memory_breakdown",
    "optimizer", "prescale_gradients", "steps_per_print", "tensorboard", "train_batch_size",
    "train_micro_batch_size_per_gpu", "wall_clock_breakdown", "wandb", "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer", "zero_optimization",
)  # fmt: skip
_REFUSED_ZERO = {
    "round_robin_gradients": "parts of parameters would lie where checkpoints do not look for them",
    "zenflow": "its optimizer steps on its own, apart from `faccel.optimizer_step`",
    "zero_hpz_partition_size": "parameters would be shared by a part of the ranks",
    "mics_shard_size": "parameters would be shared by a part of the ranks",
}


def read(options: DeepSpeedConfig) -> dict[str, Any]:
    """Return the user's settings as they are written.

    Effects: ambient. Reads the file.

    Raises:
        ConfigError: The file is not there or not JSON, or a key is unknown or another's business.
    """
    settings = options.settings
    if isinstance(settings, str):
        try:
            with open(settings) as file:
                settings = json.load(file)
        except (OSError, ValueError) as error:
            fix = "name a file of JSON"
            raise ConfigError(
                "the DeepSpeed settings cannot be read", got=f"`{settings}`: {error}", fix=fix
            ) from None
    found: dict[str, Any] = json.loads(
        json.dumps(dict(settings or {}))
    )  # a copy that nobody else holds
    for key in found:
        if key in _ELSEWHERE:
            fix = f"leave it out: {_ELSEWHERE[key]}"
            raise ConfigError(
                f"`{key}` of the DeepSpeed settings is not DeepSpeed's to decide here", fix=fix
            )
        if key not in _KEYS:
            raise ConfigError(
                f"`{key}` is no key of the DeepSpeed settings", fix=nearest(key, _KEYS)
            )
    return found


def _agree(settings: dict[str, Any], key: str, value: Any, says: str, where: str = "") -> None:
    """Fill in `value`, which is ours; refuse another one of the user's. Updates `settings`."""
    own = settings.get(key, AUTO)
    if own != AUTO and own != value:
        raise ConfigError(
            f"the DeepSpeed settings contradict {says.partition('=')[0]}",
            got=f"`{where}{key}` {own}, {says}",
            fix=f'write `"{where}{key}": "auto"`, or the same in both',
        )
    settings[key] = value


def _batches(settings: dict[str, Any], ctx: DistContext) -> None:
    """Check the numbers of the batch against each other; the engine gets windows of one micro-batch."""
    accum, world = ctx.config.grad_accum, ctx.data_world_size
    _agree(settings, "gradient_accumulation_steps", accum, f"grad_accum={accum}")
    micro, total = (
        settings.get(key, AUTO) for key in ("train_micro_batch_size_per_gpu", "train_batch_size")
    )
    if AUTO not in (micro, total) and micro * accum * world != total:
        raise ConfigError(
            "the DeepSpeed settings contradict the number of ranks",
            got=f"`train_batch_size` {total}, `train_micro_batch_size_per_gpu` {micro} of {world} ranks, {accum} times",
            fix='write `"train_batch_size": "auto"`',
        )
    if micro == AUTO:
        micro = 1 if total == AUTO else max(1, total // (accum * world))
    settings |= {
        "train_micro_batch_size_per_gpu": micro,
        "train_batch_size": micro * world,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
    }


def _precision(settings: dict[str, Any], ctx: DistContext) -> None:
    precision = ctx.config.mixed_precision
    if "bfloat16" in settings:
        settings.setdefault("bf16", settings.pop("bfloat16"))
    for key in ("bf16", "fp16"):
        part = settings.setdefault(key, {})
        says = f"mixed_precision={precision}"
        _agree(part, "enabled", precision == key, says, f"{key}.")
        if key == "fp16":
            for name in (
                "loss_scale",
                "initial_scale_power",
                "loss_scale_window",
                "hysteresis",
                "min_loss_scale",
            ):
                if part.pop(name, AUTO) not in (AUTO, 0):
                    fix = "leave it out, and give options to `faccel.init_scaler`"
                    raise ConfigError(
                        "the loss scale is a value of the loop", got=f"`fp16.{name}`", fix=fix
                    )
            part["loss_scale"] = 1.0
    settings["bf16"].setdefault("check_grad_overflow", False)


def _optimizer(settings: dict[str, Any], opt: Optimizer | None) -> None:
    """Check the user's optimizer against what the settings say it is. Updates `settings`: the engine gets ours."""
    said = settings.pop("optimizer", None)
    if said is None or opt is None:
        return
    kind = type(opt).__name__
    if str(said.get("type", AUTO)).lower() not in (AUTO, kind.lower()):
        raise ConfigError(
            "the DeepSpeed settings contradict the optimizer of the script",
            got=f"`optimizer.type` {said['type']}, a {kind}",
            fix="leave `optimizer` out of the settings",
        )
    for name, value in said.get("params", {}).items():
        own = opt.defaults.get(name, opt.param_groups[0].get(name))
        own = list(own) if isinstance(own, tuple) else own
        _agree(
            {name: value}, name, own, f"{name}={own} of the script's optimizer", "optimizer.params."
        )


def _buckets(zero: dict[str, Any], module: nn.Module) -> None:
    """Fill in the sizes that depend on the model, as transformers does. Updates `zero`."""
    config = getattr(module, "config", None)
    sizes = getattr(config, "hidden_size", None), getattr(config, "hidden_sizes", None)
    hidden = sizes[0] or (max(sizes[1]) if sizes[1] else None)
    filled = {
        "reduce_bucket_size": None if hidden is None else hidden * hidden,
        "stage3_prefetch_bucket_size": None if hidden is None else int(0.9 * hidden * hidden),
        "stage3_param_persistence_threshold": None if hidden is None else 10 * hidden,
    }
    for key, value in filled.items():
        if zero.get(key) == AUTO:
            del zero[key]
            zero |= {} if value is None else {key: value}
    count = sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters())
    zero.setdefault(
        "reduce_bucket_size", min(500_000_000, max(count, 2))
    )  # torch.empty would take 2 GB for it


def _offload(zero: dict[str, Any], plan: Plan) -> None:
    options = plan.deepspeed
    wanted = {
        "offload_optimizer": options.offload_optimizer,
        "offload_param": options.offload_params,
    }
    if plan.offload:
        wanted = {"offload_optimizer": wanted["offload_optimizer"] or "cpu",
                  "offload_param": wanted["offload_param"] or ("cpu" if zero["stage"] == 3 else None)}  # fmt: skip
    for key, device in wanted.items():
        if device is not None:
            part = zero.setdefault(key, {})
            name = "offload_params" if key == "offload_param" else key
            _agree(part, "device", device, f"{name}={device}", f"zero_optimization.{key}.")
    devices = {key: zero.get(key, {}).get("device", "none") for key in wanted}
    got = ", ".join(f"`{key}` {device}" for key, device in devices.items())
    if (
        "nvme" in devices.values()
    ):  # tried with 0.19.8: from the second update on it computes something else
        what = "what DeepSpeed keeps on a disk trains otherwise than in memory, so it cannot be used here"
        raise ConfigError(what, got=got, fix='write `offload_optimizer="cpu"`')
    if zero["stage"] < 3 and devices["offload_param"] != "none":
        what = f"ZeRO-{zero['stage']} has all parameters on every rank"
        raise ConfigError(what, got=got, fix='use `zero=3`, or `offload_optimizer="cpu"`')


def settings_of(
    module: nn.Module, opt: Optimizer | None, plan: Plan, ctx: DistContext
) -> dict[str, Any]:
    """Return what `deepspeed.initialize` gets.

    Effects: ambient. Reads the file of the settings.

    Raises:
        ConfigError: A key is unknown, or a value contradicts `Config`, the plan, the optimizer or the ranks.
    """
    settings = read(plan.deepspeed)
    zero = settings.setdefault("zero_optimization", {})
    stage = stage_of(ctx)
    _agree(zero, "stage", stage, f"zero={stage}", "zero_optimization.")
    _check_zero(zero)
    _batches(settings, ctx)
    _precision(settings, ctx)
    _optimizer(settings, opt)
    _offload(zero, plan)
    _buckets(zero, module)
    if settings.get("gradient_clipping", AUTO) == AUTO:
        settings["gradient_clipping"] = 0.0  # `optimizer_step` says it; DeepSpeed's default is 1
    settings["zero_allow_untested_optimizer"] = True  # `check_optimizer` has looked
    settings.setdefault("zero_force_ds_cpu_optimizer", False)
    left = [key for key, value in _leaves(settings) if value == AUTO]
    if left:
        fix = "write its value, or leave it out"
        raise ConfigError(
            f"nothing says what `{left[0]}` of the DeepSpeed settings is", got='"auto"', fix=fix
        )
    return settings


def stage_of(ctx: DistContext) -> int:
    """Return the ZeRO stage of a context whose strategy is DeepSpeed."""
    return 2 if ctx.config.zero is None else ctx.config.zero


def _check_zero(zero: Mapping[str, Any]) -> None:
    record: Any = importlib.import_module("deepspeed.runtime.zero.config").DeepSpeedZeroConfig
    fields: Mapping[str, Any] = record.model_fields
    known = {*fields, *(f.alias for f in fields.values() if f.alias)}
    for key, value in zero.items():
        if key not in known:
            what = f"`zero_optimization.{key}` is no key of the DeepSpeed settings"
            raise ConfigError(what, fix=nearest(key, known))
        if key in _REFUSED_ZERO and value not in (AUTO, False, None, 1, -1):
            what = f"`zero_optimization.{key}` cannot be used here"
            raise ConfigError(what, got=_REFUSED_ZERO[key], fix="leave it out")


def _leaves(node: Any, path: str = "") -> list[tuple[str, Any]]:
    if not isinstance(node, Mapping):
        return [(path, node)]
    return [
        leaf
        for key, value in node.items()
        for leaf in _leaves(value, f"{path}.{key}" if path else str(key))
    ]


def is_untested_allowed(plan: Plan) -> bool:
    """Return whether the user vouches for an optimizer that we do not know."""
    return bool(read(plan.deepspeed).get("zero_allow_untested_optimizer", False))


def dtype_of(ctx: DistContext) -> torch.dtype:
    """Return the dtype of the parameters that are computed with."""
    return ctx.compute_dtype or torch.float32
