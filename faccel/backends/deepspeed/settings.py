"""The settings of DeepSpeed, from `Config`, the plan, the user's JSON and the model.

`"auto"` is filled in; a value that contradicts the script raises.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias, cast

import torch
from torch import nn
from torch.optim import Optimizer

from faccel.checks import instance_of, local_path
from faccel.context import DistContext
from faccel.errors import ConfigError, nearest, short_repr, short_text
from faccel.plan import DeepSpeedConfig, Plan
from faccel.small_file import read_small_file
from faccel.unique_keys import load_json

Json: TypeAlias = Any  # a JSON value; `json` itself has no narrower type
Settings: TypeAlias = dict[str, Json]

AUTO = "auto"
_SET_ELSEWHERE = {
    "scheduler": "pass it to `faccel.optimizer_step(..., scheduler=...)`",
    "managed_gradient_accumulation": "`faccel.windows` accumulates gradients",
    "tensor_parallel": "use a mesh with `tp`",
    "pipeline": "use a mesh with `pp`",
    "sequence_parallel_size": "use a mesh with `cp`",
    "data_parallel_size": "set the number of processes with `faccel launch --nproc`",
    "expert_parallel": "use a mesh with `ep`",
    "torch_autocast": "use `mixed_precision`",
    "compile": "use `faccel.Plan(compile=...)`",
    "checkpoint": "`faccel.save` writes checkpoints",
    "data_types": "use `mixed_precision`",
    "amp": "use `mixed_precision`",
}
"""Keys of the DeepSpeed settings that faccel sets from another option, with the fix."""

_KEYS = (
    "activation_checkpointing", "aio", "bf16", "bfloat16", "comms_logger",
    "communication_data_type", "csv_monitor", "disable_python_gc", "dump_state", "flops_profiler",
    "fp16", "gradient_accumulation_steps", "gradient_allreduce_op", "gradient_clipping",
    "gradient_predivide_factor", "log_level", "memory_breakdown", "optimizer",
    "prescale_gradients", "steps_per_print", "tensorboard", "train_batch_size",
    "train_micro_batch_size_per_gpu", "wall_clock_breakdown", "wandb",
    "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "zero_optimization",
)  # fmt: skip
_UNSUPPORTED_ZERO = {
    "round_robin_gradients": "it moves shards away from where a checkpoint reads them",
    "zenflow": "its optimizer steps asynchronously, not in `faccel.optimizer_step`",
    "zero_hpz_partition_size": "it shards parameters over a subset of the ranks",
    "mics_shard_size": "it shards parameters over a subset of the ranks",
}
_LOSS_SCALE_KEYS = (
    "loss_scale",
    "initial_scale_power",
    "loss_scale_window",
    "hysteresis",
    "min_loss_scale",
)


def read_settings(options: DeepSpeedConfig) -> Settings:
    """Return the user's settings as they are written, as a new dict.

    Effects: ambient. Reads the file.

    Raises:
        ConfigError: The file is missing or not JSON, or a key is unknown or set elsewhere.
    """
    settings = options.settings
    if isinstance(settings, str):
        fix = 'pass the path of a JSON file, as in `settings="ds_config.json"`'
        text = read_small_file(local_path("settings", settings), "the DeepSpeed settings", fix=fix)
        try:
            settings = cast("Settings", load_json(text))
        except ConfigError as error:  # a key that occurs twice
            problem = f"in the DeepSpeed settings `{short_text(settings)}` {error.problem}"
            raise ConfigError(problem, got=error.got, fix=error.fix) from None
        except (ValueError, RecursionError) as error:
            raise ConfigError(
                f"the DeepSpeed settings `{short_text(settings)}` are not JSON",
                got=short_text(str(error)),
                fix=fix,
            ) from None
    instance_of("settings", settings or {}, Mapping, fix='write `settings={"fp16": {}}`')
    # A round trip through JSON is a deep copy: the user's mapping is never modified.
    try:
        copied: Settings = json.loads(json.dumps(dict(settings or {})))
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(
            "`settings` of DeepSpeed must contain JSON values only",
            got=short_text(str(error)),
            fix='write numbers, texts, lists and mappings, as in `settings={"fp16": {}}`',
        ) from None
    for key in copied:
        # Not ignored: the user would believe that the key had an effect.
        if key in _SET_ELSEWHERE:
            raise ConfigError(
                f"`{key}` of the DeepSpeed settings conflicts with an option of faccel",
                got=f"`{key}`",
                fix=f"leave it out: {_SET_ELSEWHERE[key]}",
            )
        if key not in _KEYS:
            raise ConfigError(
                f"`{key}` is not a key of the DeepSpeed settings", fix=nearest(key, _KEYS)
            )
    return copied


def _set_or_raise(
    settings: Settings, key: str, value: Json, source: str, section: str = ""
) -> None:
    """Set `key` to the script's `value`, unless the user wrote another one.

    Effects: updates settings.

    Args:
        settings: The section that has the key.
        key: Its name.
        value: The value of the script.
        source: Where that comes from, as `"grad_accum=4"`.
        section: Path of the section, with a dot at the end.
    """
    configured = settings.get(key, AUTO)
    if configured not in (AUTO, value):
        raise ConfigError(
            f"the DeepSpeed settings contradict {source.partition('=')[0]}",
            got=f"`{section}{key}` {configured}, {source}",
            fix=f'write `"{section}{key}": "auto"`, or the same value in both',
        )
    settings[key] = value


def _set_batch_sizes(settings: Settings, ctx: DistContext) -> None:
    """Check the batch sizes against each other, and set those of the engine.

    The engine accumulates nothing: `faccel.windows` counts the micro-batches.
    """
    # train_batch_size = train_micro_batch_size_per_gpu * grad_accum * number of data ranks.
    accum = ctx.config.grad_accum
    world = ctx.data_world_size
    _set_or_raise(settings, "gradient_accumulation_steps", accum, f"grad_accum={accum}")
    micro = settings.get("train_micro_batch_size_per_gpu", AUTO)
    total = settings.get("train_batch_size", AUTO)
    if AUTO not in (micro, total) and micro * accum * world != total:
        raise ConfigError(
            "the DeepSpeed settings contradict the number of ranks",
            got=f"`train_batch_size` {total}, `train_micro_batch_size_per_gpu` {micro} "
            f"of {world} ranks, {accum} times",
            fix='write `"train_batch_size": "auto"`',
        )
    if micro == AUTO:
        # only DeepSpeed's throughput log reads it, so any value is valid without a total
        micro = 1
        if total != AUTO:
            micro = max(1, total // (accum * world))
    # With 1 the engine does not divide losses: `MicroBatch.scale` weights the micro-batches.
    settings |= {
        "train_micro_batch_size_per_gpu": micro,
        "train_batch_size": micro * world,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
    }


def _set_precision(settings: Settings, ctx: DistContext) -> None:
    precision = ctx.config.mixed_precision
    if "bfloat16" in settings:  # DeepSpeed's old name of the section
        settings.setdefault("bf16", settings.pop("bfloat16"))
    for key in ("bf16", "fp16"):
        section = settings.setdefault(key, {})
        source = f"mixed_precision={precision}"
        _set_or_raise(section, "enabled", precision == key, source, f"{key}.")
    for name in _LOSS_SCALE_KEYS:
        if settings["fp16"].pop(name, AUTO) not in (AUTO, 0):
            raise ConfigError(
                f"`fp16.{name}` of the DeepSpeed settings conflicts with the loop's `ScalerState`",
                got=f"`fp16.{name}`",
                fix="leave it out, and pass options to `faccel.init_scaler`",
            )
    # `optimizer_step` writes the scale of the loop's `ScalerState` before each step
    settings["fp16"]["loss_scale"] = 1.0
    settings["bf16"].setdefault("check_grad_overflow", False)


def _check_optimizer_section(settings: Settings, opt: Optimizer | None) -> None:
    """Compare the section `optimizer` with the script's optimizer, and remove it.

    Effects: updates settings. The engine gets the script's optimizer.
    """
    section = settings.pop("optimizer", None)
    # Without an optimizer, before `wrap_optimizer`, there is nothing to compare it with.
    if section is None or opt is None:
        return
    class_name = type(opt).__name__
    if str(section.get("type", AUTO)).lower() not in (AUTO, class_name.lower()):
        raise ConfigError(
            "the DeepSpeed settings contradict the optimizer of the script",
            got=f"`optimizer.type` {section['type']}, a {class_name}",
            fix="leave `optimizer` out of the settings",
        )
    for name, configured in section.get("params", {}).items():
        value = opt.defaults.get(name, opt.param_groups[0].get(name))
        if isinstance(value, tuple):  # JSON has lists only
            value = list(value)
        source = f"{name}={value} of the script's optimizer"
        # A temporary section: only the comparison is needed, the optimizer has its values.
        _set_or_raise({name: configured}, name, value, source, "optimizer.params.")


def _set_bucket_sizes(zero: Settings, module: nn.Module) -> None:
    """Fill in the sizes that depend on the model, by the formulas of transformers.

    Effects: updates zero.
    """
    config = getattr(module, "config", None)
    hidden_size = getattr(config, "hidden_size", None)
    hidden_sizes = getattr(config, "hidden_sizes", None)
    if not hidden_size and hidden_sizes:
        hidden_size = max(hidden_sizes)
    sizes: dict[str, int] = {}
    if hidden_size:
        sizes = {
            # Elements, not bytes: one weight of shape [hidden, hidden].
            "reduce_bucket_size": hidden_size * hidden_size,
            "stage3_prefetch_bucket_size": int(0.9 * hidden_size * hidden_size),
            "stage3_param_persistence_threshold": 10 * hidden_size,
        }
    for key in (
        "reduce_bucket_size",
        "stage3_prefetch_bucket_size",
        "stage3_param_persistence_threshold",
    ):
        if zero.get(key) != AUTO:
            continue
        # Without a hidden size DeepSpeed's default applies, or the one below.
        del zero[key]
        if key in sizes:
            zero[key] = sizes[key]
    # A parameter of ZeRO-3 has no elements itself; `ds_numel` is its full size.
    num_elements = sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters())
    # The bucket is allocated at once: DeepSpeed's default of 500 million elements takes 2 GB.
    zero.setdefault("reduce_bucket_size", min(500_000_000, max(num_elements, 2)))


def _set_offload(zero: Settings, plan: Plan) -> None:
    requested = {
        "offload_optimizer": plan.deepspeed.offload_optimizer,
        "offload_param": plan.deepspeed.offload_params,
    }
    if plan.offload:
        requested["offload_optimizer"] = requested["offload_optimizer"] or "cpu"
        # Below stage 3 every rank needs all parameters in the memory of its device.
        if zero["stage"] == 3:
            requested["offload_param"] = requested["offload_param"] or "cpu"
    option_names = {"offload_optimizer": "offload_optimizer", "offload_param": "offload_params"}
    for key, device in requested.items():
        if device is not None:
            section = zero.setdefault(key, {})
            source = f"{option_names[key]}={device}"
            _set_or_raise(section, "device", device, source, f"zero_optimization.{key}.")
    _check_offload(zero)


def _check_offload(zero: Settings) -> None:
    devices: dict[str, str] = {}
    descriptions: list[str] = []
    for key in ("offload_optimizer", "offload_param"):
        section = zero.get(key, {})
        devices[key] = section.get("device", "none")
        descriptions.append(f"`{key}` {devices[key]}")
    got = ", ".join(descriptions)
    if "nvme" in devices.values():
        # Measured with 0.19.8: from the second update on, the result differs from training in
        # memory.
        raise ConfigError(
            "offload to NVMe is unsupported: with DeepSpeed 0.19 it changes the result of training",
            got=got,
            fix='write `offload_optimizer="cpu"`',
        )
    if zero["stage"] < 3 and devices["offload_param"] != "none":
        raise ConfigError(
            f"`offload_params` is unsupported under ZeRO-{zero['stage']}, where every rank has "
            "all parameters",
            got=got,
            fix='use `zero=3`, or `offload_optimizer="cpu"`',
        )


def settings_for(
    module: nn.Module, opt: Optimizer | None, plan: Plan, ctx: DistContext
) -> Settings:
    """Return the settings for `deepspeed.initialize`.

    Effects: ambient. Reads the file of the settings.

    Raises:
        ConfigError: A key is unknown, or a value contradicts `Config`, the plan, the optimizer or
            the number of ranks.
    """
    settings = read_settings(plan.deepspeed)
    zero = settings.setdefault("zero_optimization", {})
    stage = zero_stage(ctx)
    _set_or_raise(zero, "stage", stage, f"zero={stage}", "zero_optimization.")
    _check_zero_section(zero)
    _set_batch_sizes(settings, ctx)
    _set_precision(settings, ctx)
    _check_optimizer_section(settings, opt)
    _set_offload(zero, plan)
    _set_bucket_sizes(zero, module)
    if settings.get("gradient_clipping", AUTO) == AUTO:
        # DeepSpeed's default is 1; `optimizer_step` sets the limit before each step
        settings["gradient_clipping"] = 0.0
    # `check_optimizer` decides which optimizers are supported
    settings["zero_allow_untested_optimizer"] = True
    settings.setdefault("zero_force_ds_cpu_optimizer", False)
    # Last: each "auto" that faccel fills in is replaced by now.
    for path, value in _flatten(settings):
        if value == AUTO:
            raise ConfigError(
                f'`{path}` of the DeepSpeed settings is "auto", and faccel has no value for it',
                got='"auto"',
                fix="write its value, or leave it out",
            )
    return settings


def zero_stage(ctx: DistContext) -> int:
    """Return the ZeRO stage of a context whose strategy is DeepSpeed."""
    if ctx.config.zero is None:
        # It communicates as much as replicas do: Rajbhandari et al. 2020 (arXiv:1910.02054).
        return 2
    return ctx.config.zero


def _check_zero_section(zero: Mapping[str, Json]) -> None:
    config_class = importlib.import_module("deepspeed.runtime.zero.config").DeepSpeedZeroConfig
    fields = config_class.model_fields
    aliases = {field.alias for field in fields.values() if field.alias}
    known = {*fields, *aliases}
    for key, value in zero.items():
        if key not in known:
            raise ConfigError(
                f"`zero_optimization.{key}` is not a key of the DeepSpeed settings",
                fix=nearest(key, known),
            )
        if key in _UNSUPPORTED_ZERO and value not in (AUTO, False, None, 1, -1):
            raise ConfigError(
                f"`zero_optimization.{key}` is unsupported: {_UNSUPPORTED_ZERO[key]}",
                got=short_repr(value),
                fix="leave it out",
            )


def _flatten(node: Json, path: str = "") -> Iterator[tuple[str, Json]]:
    """Yield each leaf of nested mappings with its path, as `"fp16.enabled"`."""
    if not isinstance(node, Mapping):
        yield path, node
        return
    for key, value in node.items():
        child = str(key)
        if path:
            child = f"{path}.{key}"
        yield from _flatten(value, child)


def allows_untested_optimizer(plan: Plan) -> bool:
    """Return whether the user's settings allow an optimizer that faccel does not list."""
    return bool(read_settings(plan.deepspeed).get("zero_allow_untested_optimizer", False))


def dtype_of(ctx: DistContext) -> torch.dtype:
    """Return the dtype of the parameters in forward and backward."""
    return ctx.compute_dtype or torch.float32
