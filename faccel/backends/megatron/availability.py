"""Whether Megatron-core can run here, and with which configurations."""

from __future__ import annotations

from collections.abc import Mapping

from faccel.config import Config

SUPPORTED = ">=0.16"
INSTALL = f'run `pip install "megatron-core{SUPPORTED}"`, or `pip install "faccel[megatron]"`'


def probe(env: Mapping[str, str]) -> str | None:
    """Return why Megatron-core cannot run here, or None if it can.

    Effects: ambient. Reads which packages are installed.
    """
    from importlib import metadata  # takes milliseconds, and only this strategy needs it

    try:
        version = metadata.version("megatron-core")
    except metadata.PackageNotFoundError:
        return "megatron-core is not installed"
    return problem_of_version(version)


def problem_of_version(version: str) -> str | None:
    """Return why a version of Megatron-core cannot run, or None if it can.

    Effects: pure.

    Examples:
        >>> problem_of_version("0.15.0")
        'megatron-core 0.15.0 is installed, and faccel needs >=0.16'
    """
    # The optimizer's groups of parameters and its shards are read from fields of this version on.
    if _minor(version) < (0, 16):
        return f"megatron-core {version} is installed, and faccel needs {SUPPORTED}"
    return None


def _minor(version: str) -> tuple[int, int]:
    major, minor, *_ = [*version.split("."), "0"]
    if not (major.isdecimal() and minor.isdecimal()):
        return 0, 0
    return int(major), int(minor)


def refuse(config: Config, device_type: str) -> str | None:
    """Return why Megatron-core cannot run a configuration, or None if it can.

    Effects: pure.
    """
    if config.mixed_precision not in ("no", "bf16"):
        return f"mixed_precision={config.mixed_precision}; it is no or bf16"
    if config.zero not in (None, 0, 1):
        return f"zero={config.zero}; its distributed optimizer is zero=1"
    return None
