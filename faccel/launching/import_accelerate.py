"""Converts a configuration file of Accelerate, of any version, to fields and launch options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

from faccel.errors import ConfigError

_Keys = dict[str, Any]
# Keys without a field or option, because faccel detects the value or has no use for it.
_NOT_NEEDED = (
    "same_network",
    "main_training_function",
    "use_cpu",
    "enable_cpu_affinity",
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
# Values of `distributed_type` that name an engine, and the section with its options.
_ENGINES = {
    "DEEPSPEED": "deepspeed_config",
    "MEGATRON_LM": "megatron_lm_config",
    "TPU": "",
    "XLA": "",
}
_AXES = {
    "parallelism_config_dp_replicate_size": "dp_replicate",
    "parallelism_config_dp_shard_size": "dp_shard",
    "parallelism_config_tp_size": "tp",
    "parallelism_config_cp_size": "cp",
}


@attrs.frozen
class ImportedConfig:
    """A converted configuration file.

    Args:
        values: Fields of `Config`.
        options: Options of `faccel launch`. The configuration file does not hold them, because they
            differ between nodes.
        without_equivalent: Keys that this version of faccel does not support, and their values.
    """

    values: Mapping[str, Any]
    options: tuple[str, ...]
    without_equivalent: Mapping[str, Any]


def from_accelerate(config: Mapping[str, Any]) -> ImportedConfig:
    """Convert the keys of Accelerate's `ClusterConfig`, those of its older versions included.

    Effects: pure.

    Raises:
        ConfigError: The mapping is not a configuration of Accelerate, or a value is invalid.

    Examples:
        >>> imported = from_accelerate({"distributed_type": "MULTI_CPU", "num_processes": 4})
        >>> imported.values, imported.options
        ({'device': 'cpu'}, ('--nproc', '4'))
    """
    # Every version of Accelerate writes at least one of the two.
    if "distributed_type" not in config and "compute_environment" not in config:
        raise ConfigError(
            "the file is not a configuration of Accelerate",
            got=", ".join(map(str, config)) or "an empty file",
            fix="use a file that `accelerate config` wrote",
        )
    # Each function below removes the keys that it converts; those that remain are unsupported.
    remaining = _copy(config)
    kind = str(remaining.pop("distributed_type", "NO"))
    values: _Keys = {}
    _convert_precision(remaining, values)
    if remaining.pop("use_cpu", False) or kind == "MULTI_CPU":
        values["device"] = "cpu"
    if remaining.pop("debug", False):
        values["debug"] = True
    _convert_accumulation(_section(remaining, "deepspeed_config"), values)
    mesh = _convert_mesh(remaining, kind)
    if mesh:
        values["mesh"] = mesh
    options = _convert_launch(remaining)
    # The other values are clouds (Amazon SageMaker), which have no equivalent.
    if remaining.get("compute_environment") == "LOCAL_MACHINE":
        del remaining["compute_environment"]
    for key in _NOT_NEEDED:
        remaining.pop(key, None)
    if kind in _ENGINES and not _section(remaining, _ENGINES[kind]):
        # an engine without a section would disappear from the report
        remaining["distributed_type"] = kind
    return ImportedConfig(values, options, _flatten(remaining))


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
            got=repr(section),
            fix=f"write the keys of `{key}` on indented lines below it",
        )
    return section


def _int(name: str, value: Any) -> int:
    try:
        return int(value)
    except (TypeError, ValueError):
        raise ConfigError(
            f"`{name}` of the file must be a whole number",
            got=repr(value),
            fix=f"write `{name}: 1`",
        ) from None


def _convert_accumulation(section: _Keys, values: _Keys) -> None:
    num_steps = section.get("gradient_accumulation_steps")
    if not isinstance(num_steps, int) or num_steps < 1:  # "auto" has no equivalent
        return
    del section["gradient_accumulation_steps"]
    if num_steps > 1:
        values["grad_accum"] = num_steps


def _convert_precision(remaining: _Keys, values: _Keys) -> None:
    default = "no"
    if remaining.pop("fp16", False):  # Accelerate before 0.12
        default = "fp16"
    precision = remaining.pop("mixed_precision", default)
    if precision is False:  # YAML reads an unquoted `no` as False
        precision = "no"
    precision = str(precision).lower()
    if precision in ("fp16", "bf16"):
        values["mixed_precision"] = precision
    elif precision != "no":
        remaining["mixed_precision"] = precision


def _convert_mesh(remaining: _Keys, kind: str) -> dict[str, int]:
    # Newer versions only. Older files describe parallelism by `distributed_type`.
    sizes = _section(remaining, "parallelism_config")
    remaining.pop("parallelism_config", None)
    mesh: dict[str, int] = {}
    for key, axis in _AXES.items():
        size = sizes.pop(key, None)
        if size not in (None, 1):
            mesh[axis] = _int(key, size)
    if sizes:
        remaining["parallelism_config"] = sizes
    strategy = str(_section(remaining, "fsdp_config").get("fsdp_sharding_strategy", "FULL_SHARD"))
    # 3 is NO_SHARD in Accelerate's numbering
    if kind == "FSDP" and "dp_shard" not in mesh and strategy not in ("NO_SHARD", "3"):
        mesh["dp_shard"] = -1
    return mesh


def _convert_launch(remaining: _Keys) -> tuple[str, ...]:
    """Return the options of `faccel launch`. `num_processes` of Accelerate counts all nodes."""
    # Accelerate accepts 0 and null, and runs one process on one node.
    num_nodes = max(1, _int("num_machines", remaining.pop("num_machines", None) or 1))
    num_processes = max(1, _int("num_processes", remaining.pop("num_processes", None) or 1))
    # `--nproc` is one number for all nodes.
    if num_processes % num_nodes:
        valid = -(-num_processes // num_nodes) * num_nodes
        raise ConfigError(
            "`num_processes` of the file must be a multiple of `num_machines`",
            got=f"{num_processes} processes on {num_nodes} nodes",
            fix=f"write `num_processes: {valid}`",
        )
    node_rank = remaining.pop("machine_rank", None)
    host = remaining.pop("main_process_ip", None)
    port = remaining.pop("main_process_port", None)
    is_elastic = remaining.pop("rdzv_backend", "static") == "c10d"
    options: list[str] = []
    if num_processes != 1:
        options += ["--nproc", str(num_processes // num_nodes)]
    if num_nodes > 1:
        options += ["--nnodes", str(num_nodes)]
        if is_elastic:
            endpoint = f"{host or 'HOST'}:{port or 29400}"
            return (*options, "--rdzv-endpoint", endpoint)
        # The address may be missing in a file for one node that was edited by hand.
        options += ["--node-rank", str(node_rank or 0), "--main-address", str(host or "HOST")]
    if port:
        options += ["--main-port", str(port)]
    return tuple(options)
