"""A configuration file of Accelerate, of any version, as one of faccel and a command line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

from faccel.errors import ConfigError

_NOT_NEEDED = (  # what faccel finds out itself, does always, or has no use for
    "same_network",
    "main_training_function",
    "use_cpu",
    "enable_cpu_affinity",
    "tpu_use_cluster",
    "tpu_use_sudo",
    "downcast_bf16",
)
_SECTIONS = ("deepspeed_config", "fsdp_config", "fp8_config", "megatron_lm_config", "parallelism_config",
             "mpirun_config", "dynamo_config")  # fmt: skip
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
class Imported:
    """What became of a file.

    Args:
        values: Fields of `Config`.
        options: Options of `faccel launch`, which a configuration file does not hold because machines differ in them.
        without_equal: What this version of faccel has nothing for, by key.
    """

    values: Mapping[str, Any]
    options: tuple[str, ...]
    without_equal: Mapping[str, Any]


def from_accelerate(given: Mapping[str, Any]) -> Imported:
    """Translate the keys of Accelerate's `ClusterConfig`, those of its older versions included.

    Effects: pure.

    Raises:
        ConfigError: It is no file of Accelerate's.

    Examples:
        >>> out = from_accelerate({"distributed_type": "MULTI_CPU", "num_processes": 4, "use_cpu": True, "fp16": False})
        >>> out.values, out.options
        ({'device': 'cpu'}, ('--nproc', '4'))
    """
    if "distributed_type" not in given and "compute_environment" not in given:
        fix = "name a file that `accelerate config` wrote"
        raise ConfigError(
            "this is no configuration of Accelerate",
            got=", ".join(map(str, given)) or "nothing",
            fix=fix,
        )
    left = {key: dict(value) if isinstance(value, Mapping) else value
            for key, value in given.items() if value not in (None, {}, [], "")}  # fmt: skip
    kind = str(left.pop("distributed_type", "NO"))
    values: dict[str, Any] = {}
    _precision(left, values)
    if left.pop("use_cpu", False) or kind == "MULTI_CPU":
        values["device"] = "cpu"
    if left.pop("debug", False):
        values["debug"] = True
    _accumulation(_section(left, "deepspeed_config"), values)
    mesh = _mesh(left, kind)
    if mesh:
        values["mesh"] = mesh
    options = _options(left)
    if left.get("compute_environment") == "LOCAL_MACHINE":
        del left["compute_environment"]
    for key in _NOT_NEEDED:
        left.pop(key, None)
    if kind in _ENGINES and not _section(left, _ENGINES[kind]):
        left["distributed_type"] = kind  # its section would have said so
    flat = {
        f"{key}.{name}": each for key in _SECTIONS for name, each in _section(left, key).items()
    }
    kept = {key: value for key, value in left.items() if key not in _SECTIONS}
    return Imported(values, options, {**kept, **flat})


def _section(left: dict[str, Any], key: str) -> dict[str, Any]:
    section = left.get(key) or {}
    if not isinstance(section, dict):
        fix = "write its keys below it"
        raise ConfigError(
            f"section `{key}` of the file is not a mapping", got=repr(section), fix=fix
        )
    return section


def _count(name: str, value: Any) -> int:
    try:
        return int(value)
    except (TypeError, ValueError):
        fix = f"write `{name}: 1`"
        raise ConfigError(
            f"`{name}` of the file must be a number", got=repr(value), fix=fix
        ) from None


def _accumulation(section: dict[str, Any], values: dict[str, Any]) -> None:
    steps = section.get("gradient_accumulation_steps")
    if isinstance(steps, int) and steps > 0:  # not "auto"
        del section["gradient_accumulation_steps"]
        values |= {"grad_accum": steps} if steps > 1 else {}


def _precision(left: dict[str, Any], values: dict[str, Any]) -> None:
    old = "fp16" if left.pop("fp16", False) else "no"  # versions before 0.12
    precision = left.pop("mixed_precision", old)
    precision = "no" if precision is False else str(precision).lower()  # what YAML takes `no` for
    if precision in ("fp16", "bf16"):
        values["mixed_precision"] = precision
    elif precision != "no":
        left["mixed_precision"] = precision


def _mesh(left: dict[str, Any], kind: str) -> dict[str, int]:
    parallel = _section(left, "parallelism_config")
    left.pop("parallelism_config", None)
    mesh = {
        axis: _count(key, parallel.pop(key))
        for key, axis in _AXES.items()
        if parallel.get(key) not in (None, 1)
    }
    for key in _AXES:
        parallel.pop(key, None)
    if parallel:
        left["parallelism_config"] = parallel
    strategy = str(_section(left, "fsdp_config").get("fsdp_sharding_strategy", "FULL_SHARD"))
    if kind == "FSDP" and "dp_shard" not in mesh and strategy not in ("NO_SHARD", "3"):
        mesh["dp_shard"] = -1
    return mesh


def _options(left: dict[str, Any]) -> tuple[str, ...]:
    machines = max(1, _count("num_machines", left.pop("num_machines", 1) or 1))
    processes = max(1, _count("num_processes", left.pop("num_processes", 1) or 1))
    if processes % machines:
        fix = f"write `num_processes: {-(-processes // machines) * machines}`"
        got = f"{processes} processes on {machines} machines"
        raise ConfigError("each machine runs as many processes as the others", got=got, fix=fix)
    rank, host, port = (
        left.pop(key, None) for key in ("machine_rank", "main_process_ip", "main_process_port")
    )
    rendezvous = left.pop("rdzv_backend", "static")
    options: list[str] = ["--nproc", str(processes // machines)] if processes != 1 else []
    if machines > 1:
        options += ["--nnodes", str(machines)]
    if machines > 1 and rendezvous == "c10d":
        options += ["--rdzv-endpoint", f"{host or 'HOST'}:{port or 29400}"]
    elif machines > 1:
        options += ["--node-rank", str(rank or 0), "--main-address", str(host or "HOST")]
    if port and not (machines > 1 and rendezvous == "c10d"):
        options += ["--main-port", str(port)]
    return tuple(options)
