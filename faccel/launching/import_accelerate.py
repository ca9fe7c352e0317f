"""Converts a configuration file of Accelerate, of any version, to fields and launch options."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import attrs

from faccel.config_file import NPROC
from faccel.errors import ConfigError, short_repr
from faccel.launching.accelerate_fp8 import convert_fp8
from faccel.launching.accelerate_megatron import convert_megatron
from faccel.launching.accelerate_plan import convert_section, is_true, whole_number
from faccel.plan_values import nested

_Keys = dict[str, Any]
# Keys without a field or option, because faccel detects the value or has no use for it.
_NOT_NEEDED = (
    "same_network",
    "main_training_function",
    "use_cpu",
    "tpu_use_cluster",
    "tpu_use_sudo",
    "downcast_bf16",
)
_SECTIONS = (
    "deepspeed_config",
    "fsdp_config",
    "fp8_config",
    "megatron_lm_config",
    "parallelism_config",
    "mpirun_config",
    "dynamo_config",
)
# Those whose devices faccel finds itself; MPS is of Accelerate 0.12.
_DEVICES = ("CPU", "GPU", "HPU", "MLU", "MUSA", "NEURON", "NPU", "SDAA", "XPU")
_KINDS = (
    "NO",
    "MPS",
    *(f"MULTI_{device}" for device in _DEVICES),
    "FSDP",
    "DEEPSPEED",
    "MEGATRON_LM",
)
# The section that applies to a value of `distributed_type`.
_SECTION_OF = {"FSDP": "fsdp_config", "DEEPSPEED": "deepspeed_config"}
_AXES = {
    "parallelism_config_dp_replicate_size": "dp_replicate",
    "parallelism_config_dp_shard_size": "dp_shard",
    "parallelism_config_tp_size": "tp",
    "parallelism_config_cp_size": "cp",
    "parallelism_config_sp_size": "cp",  # Ulysses is a method of `context_parallel`
}


@attrs.frozen
class ImportedConfig:
    """A converted configuration file.

    Args:
        values: Fields of `Config`, and `nproc`, the processes per node.
        options: Options of `faccel launch`. The configuration file does not hold them, because they
            differ between nodes.
        without_equivalent: Keys that this version of faccel does not support, and their values.
        in_script: Keys whose equal is an argument in the script, and what to write there.
    """

    values: Mapping[str, Any]
    options: tuple[str, ...]
    without_equivalent: Mapping[str, Any]
    in_script: Mapping[str, str] = attrs.field(factory=dict)


def from_accelerate(config: Mapping[str, Any]) -> ImportedConfig:
    """Convert the keys of Accelerate's `ClusterConfig`, those of its older versions included.

    Effects: pure.

    Raises:
        ConfigError: The mapping is not a configuration of Accelerate, or a value is invalid.

    Examples:
        >>> from_accelerate({"distributed_type": "MULTI_CPU", "num_processes": 4}).values
        {'device': 'cpu', 'nproc': 4}
    """
    # Every version of Accelerate writes at least one of the two.
    if "distributed_type" not in config and "compute_environment" not in config:
        raise ConfigError(
            "the file is not a configuration of Accelerate",
            got=f"the keys {short_repr(list(config))}",
            fix="use a file that `accelerate config` wrote",
        )
    # Each function below removes the keys that it converts; those that remain are unsupported.
    remaining = _copy(config)
    # YAML reads an unquoted `NO` as False.
    kind = str(remaining.pop("distributed_type", False) or "NO")
    values: _Keys = {}
    _convert_precision(remaining, kind, values)
    _convert_switches(remaining, kind, values)
    options = _convert_launch(remaining, values)
    # Accelerate binds to the NUMA node of the GPU, too.
    if is_true(remaining.pop("enable_cpu_affinity", False)):
        options = (*options, "--numa-binding", "node")
    _convert_engine(remaining, kind, values)
    mesh = _convert_mesh(remaining, kind, values)
    plan = _convert_plan(remaining, kind)
    in_script: Mapping[str, str] = {}
    if kind == "MEGATRON_LM":
        megatron = convert_megatron(_section(remaining, "megatron_lm_config"))
        in_script = megatron.in_script
        mesh |= megatron.mesh
        plan |= megatron.plan
        _set_grad_accum(megatron.grad_accum, values)
    if mesh:
        values["mesh"] = mesh
    if values.get("mixed_precision") == "fp8":
        plan |= convert_fp8(_section(remaining, "fp8_config"))
    if plan:
        values["plan"] = nested(plan.items())
    _remove_unneeded(remaining)
    # These would disappear from the report, as would a typing error.
    if kind not in _KINDS:
        remaining["distributed_type"] = kind
    return ImportedConfig(values, options, _flatten(remaining), in_script)


def _copy(config: Mapping[str, Any]) -> _Keys:
    """Copy a mapping and its sections, without empty values."""
    copied: _Keys = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            copied[key] = dict(value)
        elif value not in (None, {}, [], ""):
            copied[key] = value
    return copied


def _flatten(remaining: Mapping[str, Any]) -> _Keys:
    """Return the keys of all sections as `section.key`, after the keys outside of sections."""
    flat = {key: value for key, value in remaining.items() if key not in _SECTIONS}
    for name in _SECTIONS:
        for key, value in _section(remaining, name).items():
            flat[f"{name}.{key}"] = value
    return flat


def _section(remaining: Mapping[str, Any], key: str) -> _Keys:
    section = remaining.get(key) or {}
    if not isinstance(section, dict):
        raise ConfigError(
            f"section `{key}` of the file must be a mapping",
            got=short_repr(section),
            fix=f"write the keys of `{key}` on indented lines below it",
        )
    return section


def _host(value: object) -> str:
    # The address may be missing in a file for one node that was edited by hand.
    if value is None:
        return "HOST"
    # A host is printed in a command that users copy to a shell.
    if isinstance(value, str) and re.fullmatch(r"[\w.:%\[\]-]+", value):
        return value
    raise ConfigError(
        "`main_process_ip` of the file must be the name or the address of a host",
        got=short_repr(value),
        fix="write `main_process_ip: 127.0.0.1`",
    )


def _convert_switches(remaining: _Keys, kind: str, values: _Keys) -> None:
    if is_true(remaining.pop("use_cpu", False)) or kind == "MULTI_CPU":
        values["device"] = "cpu"
    if is_true(remaining.pop("debug", False)):
        values["debug"] = True


def _remove_unneeded(remaining: _Keys) -> None:
    # The other values are clouds (Amazon SageMaker), which have no equivalent.
    if remaining.get("compute_environment") == "LOCAL_MACHINE":
        del remaining["compute_environment"]
    if remaining.get("gpu_ids") == "all":
        del remaining["gpu_ids"]
    for key in _NOT_NEEDED:
        remaining.pop(key, None)


def _convert_engine(remaining: _Keys, kind: str, values: _Keys) -> None:
    """Convert what fields of `Config` express of DeepSpeed."""
    section = _section(remaining, "deepspeed_config")
    num_steps = section.get("gradient_accumulation_steps")
    if isinstance(num_steps, int) and num_steps >= 1:  # "auto" has no equivalent
        del section["gradient_accumulation_steps"]
        _set_grad_accum(num_steps, values)
    if kind != "DEEPSPEED":
        return
    values["strategy"] = "deepspeed"
    if "zero_stage" in section:
        values["zero"] = whole_number("zero_stage", section.pop("zero_stage"))
    # Below stage 3 parameters are not offloaded, in Accelerate and DeepSpeed without an error.
    if values.get("zero") != 3:
        section.pop("offload_param_device", None)


def _set_grad_accum(num_micro_batches: int | None, values: _Keys) -> None:
    if num_micro_batches is not None and num_micro_batches > 1:
        values["grad_accum"] = num_micro_batches


def _convert_plan(remaining: _Keys, kind: str) -> dict[str, Any]:
    """Return the arguments of `Plan` for the sections that apply, without their keys."""
    plan: dict[str, Any] = {}
    if kind in _SECTION_OF:
        name = _SECTION_OF[kind]
        plan |= convert_section(name, _section(remaining, name))
    # Accelerate 0.15 had the key outside of a section.
    if "dynamo_backend" in remaining:
        remaining["dynamo_config"] = {"dynamo_backend": remaining.pop("dynamo_backend")}
    section = _section(remaining, "dynamo_config")
    compiler = str(section.get("dynamo_backend", "no")).lower()
    if compiler in ("no", "false"):  # YAML reads an unquoted `no` as False
        section.clear()  # the other keys have no effect
    else:
        plan |= convert_section("dynamo_config", section)
    return plan


def _convert_precision(remaining: _Keys, kind: str, values: _Keys) -> None:
    default = "no"
    if is_true(remaining.pop("fp16", False)):  # Accelerate before 0.12
        default = "fp16"
    precision = remaining.pop("mixed_precision", default)
    if precision is False:  # YAML reads an unquoted `no` as False
        precision = "no"
    precision = str(precision).lower()
    is_supported = precision in ("fp16", "bf16")
    if precision == "fp8":
        is_supported = kind != "DEEPSPEED"
    if is_supported:
        values["mixed_precision"] = precision
    elif precision != "no":
        remaining["mixed_precision"] = precision


def _convert_mesh(remaining: _Keys, kind: str, values: _Keys) -> dict[str, int]:
    # Newer versions only. Older files describe parallelism by `distributed_type`.
    sizes = _section(remaining, "parallelism_config")
    remaining.pop("parallelism_config", None)
    mesh: dict[str, int] = {}
    for key, axis in _AXES.items():
        if axis in mesh:
            continue  # listed: Accelerate has no sequence in two ways either
        size = sizes.pop(key, None)
        if size not in (None, 1):
            mesh[axis] = whole_number(key, size, minimum=-1)
    if sizes:
        remaining["parallelism_config"] = sizes
    if kind != "FSDP" or "dp_shard" in mesh:
        return mesh
    section = _section(remaining, "fsdp_config")
    # The first is the older key of the two.
    strategy = section.get("fsdp_sharding_strategy", section.get("fsdp_reshard_after_forward"))
    strategy = str(strategy or "FULL_SHARD").upper()
    # The numbers are those of Accelerate.
    if strategy in ("NO_SHARD", "3"):
        return mesh
    if strategy in ("HYBRID_SHARD", "4", "HYBRID_SHARD_ZERO2", "_HYBRID_SHARD_ZERO2", "5"):
        # Sharded within a node and replicated over the nodes.
        return {**mesh, "dp_replicate": -1, "dp_shard": values.get(NPROC, 1)}
    return {**mesh, "dp_shard": -1}


def _convert_launch(remaining: _Keys, values: _Keys) -> tuple[str, ...]:
    """Return the options of `faccel launch`. `num_processes` of Accelerate counts all nodes."""
    # Accelerate accepts 0 and null, and runs one process on one node.
    num_nodes = whole_number("num_machines", remaining.pop("num_machines", None) or 1) or 1
    has_count = "num_processes" in remaining
    count = remaining.pop("num_processes", None) or 1
    num_processes = whole_number("num_processes", count) or 1
    # `--nproc` is one number for all nodes.
    if num_processes % num_nodes:
        valid = -(-num_processes // num_nodes) * num_nodes
        raise ConfigError(
            "`num_processes` of the file must be a multiple of `num_machines`",
            got=f"{num_processes} processes on {num_nodes} nodes",
            fix=f"write `num_processes: {valid}`",
        )
    node_rank = whole_number("machine_rank", remaining.pop("machine_rank", None) or 0)
    host = _host(remaining.pop("main_process_ip", None))
    port = whole_number(
        "main_process_port", remaining.pop("main_process_port", None) or 0, maximum=65535
    )
    is_elastic = remaining.get("rdzv_backend", "static") == "c10d"
    if is_elastic or remaining.get("rdzv_backend") == "static":
        del remaining["rdzv_backend"]  # others, such as etcd, have no equivalent
    options: list[str] = []
    if has_count:
        values[NPROC] = num_processes // num_nodes
    if num_nodes > 1:
        options += ["--nnodes", str(num_nodes)]
        if is_elastic:
            endpoint = f"{host}:{port or 29400}"
            return (*options, "--rdzv-endpoint", endpoint)
        options += ["--node-rank", str(node_rank), "--main-address", host]
    if port:
        options += ["--main-port", str(port)]
    return tuple(options)
