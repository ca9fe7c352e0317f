"""From an environment to a `Topology`: one pure detector per launcher."""

from __future__ import annotations

from collections.abc import Mapping

from faccel.context import Topology
from faccel.errors import TopologyError

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def _number(env: Mapping[str, str], key: str, default: int | None = None) -> int:
    text = env.get(key)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        raise TopologyError(
            f"`{key}` must be a whole number", saw=repr(text), fix="start the processes with torchrun, which sets it"
        ) from None


def detect_torchrun(env: Mapping[str, str]) -> Topology | None:
    """Read what torchrun (torchelastic) sets; None where `RANK` and `WORLD_SIZE` are both absent.

    Effects: pure.

    Raises:
        TopologyError: Half of it is set.
    """
    if "RANK" not in env and "WORLD_SIZE" not in env:
        return None
    missing = [key for key in _TORCHRUN if key not in env]
    if missing:
        there = ", ".join(f"{key}={env[key]}" for key in _TORCHRUN if key in env)
        raise TopologyError(
            f"the environment is half set: {', '.join(f'`{key}`' for key in missing)} missing",
            saw=there,
            fix="start the processes with torchrun, which sets all of them, or unset `RANK` and `WORLD_SIZE`",
        )
    local_world_size = _number(env, "LOCAL_WORLD_SIZE")
    world_size = _number(env, "WORLD_SIZE")
    return Topology(
        rank=_number(env, "RANK"),
        world_size=world_size,
        local_rank=_number(env, "LOCAL_RANK"),
        local_world_size=local_world_size,
        node_rank=_number(env, "GROUP_RANK", _number(env, "RANK") // max(1, local_world_size)),
        num_nodes=_number(env, "GROUP_WORLD_SIZE", -(-world_size // max(1, local_world_size))),
        source="torchrun",
        main_address=env["MASTER_ADDR"],
        main_port=_number(env, "MASTER_PORT"),
        attempt=_number(env, "TORCHELASTIC_RESTART_COUNT", 0),
        store_is_hosted=env.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def detect_single(env: Mapping[str, str]) -> Topology | None:
    """Return a world of one process.

    Effects: pure.
    """
    return Topology()


DETECTORS = (detect_torchrun, detect_single)
"""In the order in which they are asked."""


def detect(env: Mapping[str, str]) -> Topology:
    """Return what the first detector that knows the environment says.

    Effects: pure.

    Examples:
        >>> detect({}).world_size
        1
    """
    return next(topology for each in DETECTORS if (topology := each(env)) is not None)
