"""A configuration file of Accelerate, of any version, as one of faccel and a command line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

from faccel.errors import ConfigError

_NOT_NEEDED = (  # what faccel finds out itself, does always, or has no use for
    "compute_environment",
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
            "this is no configuration of Accelerate", saw=", ".join(map(str, given)) or "nothing", fix=fix
        )
    left = {key: value for key, value in given.items() if value not in (None, {}, [], "")}
    kind = str(left.pop("distributed_type", "NO"))
    values: dict[str, Any] = {}
    _precision(left, values)
    if left.pop("use_cpu", False) or kind == "MULTI_CPU":
        values["device"] = "cpu"
    if left.pop("debug", False):
        values["debug"] = True
    accumulation = (left.get("deepspeed_config") or {}).pop("gradient_accumulation_steps", None)
    if isinstance(accumulation, int) and accumulation > 1:
        values["grad_accum"] = accumulation
    mesh = _mesh(left, kind)
    if mesh:
        values["mesh"] = mesh
    options = _options(left)
    for key in _NOT_NEEDED:
        left.pop(key, None)
    if kind == "DEEPSPEED" and "deepspeed_config" not in left:
        left["deepspeed_config"] = {}
    flat = {f"{key}.{name}": each for key in _SECTIONS for name, each in dict(left.pop(key, None) or {}).items()}
    return Imported(values, options, {**left, **flat})


def _precision(left: dict[str, Any], values: dict[str, Any]) -> None:
    old = "fp16" if left.pop("fp16", False) else "no"  # versions before 0.12
    precision = str(left.pop("mixed_precision", old)).lower()
    if precision in ("fp16", "bf16"):
        values["mixed_precision"] = precision
    elif precision != "no":
        left["mixed_precision"] = precision


def _mesh(left: dict[str, Any], kind: str) -> dict[str, int]:
    parallel = dict(left.pop("parallelism_config", None) or {})
    mesh = {axis: int(parallel.pop(key)) for key, axis in _AXES.items() if parallel.get(key) not in (None, 1)}
    for key in _AXES:
        parallel.pop(key, None)
    if parallel:
        left["parallelism_config"] = parallel
    if kind == "FSDP" and "dp_shard" not in mesh:
        mesh["dp_shard"] = -1
    return mesh


def _options(left: dict[str, Any]) -> tuple[str, ...]:
    machines = int(left.pop("num_machines", 1) or 1)
    processes = int(left.pop("num_processes", 1) or 1)
    rank, host, port = (left.pop(key, None) for key in ("machine_rank", "main_process_ip", "main_process_port"))
    rendezvous = left.pop("rdzv_backend", "static")
    options: list[str] = ["--nproc", str(max(1, processes // machines))] if processes != 1 else []
    if machines > 1:
        options += ["--nnodes", str(machines)]
    if machines > 1 and rendezvous == "c10d":
        options += ["--rdzv-endpoint", f"{host or 'HOST'}:{port or 29400}"]
    elif machines > 1:
        options += ["--node-rank", str(rank or 0), "--main-address", str(host or "HOST")]
    if port and not (machines > 1 and rendezvous == "c10d"):
        options += ["--main-port", str(port)]
    return tuple(options)
