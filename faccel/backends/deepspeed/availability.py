"""Whether DeepSpeed can run here, and the environment variables that it reads."""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import sys
from collections.abc import Generator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch

from faccel.config import Config
from faccel.context import DistContext
from faccel.device_table import is_host
from faccel.errors import BackendError

SUPPORTED = ">=0.19,<0.20"
INSTALL = (
    f'run `DS_BUILD_OPS=0 pip install --no-build-isolation "deepspeed{SUPPORTED}"`, and install a '
    "C++ compiler as `c++` on the PATH (`apt install g++`): DeepSpeed builds its operators when "
    "they are first used"
)


def probe(env: Mapping[str, str]) -> str | None:
    """Return why DeepSpeed cannot run here, or None if it can.

    Effects: ambient. Reads which packages and programs are installed.
    """
    from importlib import metadata  # takes milliseconds, and only this strategy needs it

    try:
        # `import deepspeed` takes seconds and chooses a device for the process.
        version = metadata.version("deepspeed")
    except metadata.PackageNotFoundError:
        return "deepspeed is not installed"
    # The engine's private fields are used here, so only the minor version that was tested runs.
    if version.split(".")[:2] != ["0", "19"]:
        return f"deepspeed {version} is installed, and this version of faccel needs {SUPPORTED}"
    # As `torch.utils.cpp_extension` looks for a compiler.
    compiler = env.get("CXX") or "c++"
    if shutil.which(compiler, path=env.get("PATH")) is None:
        return f"`{compiler}` is not on the PATH: its operators need a C++ compiler"
    return None


def refuse(config: Config, device_type: str) -> str | None:
    """Return why DeepSpeed cannot run a configuration, or None if it can.

    Effects: pure.
    """
    if config.mixed_precision == "fp8":
        return "mixed_precision=fp8, whose layers DeepSpeed's flat parameters do not support"
    if config.mixed_precision.endswith("-true"):
        return (
            f"mixed_precision={config.mixed_precision}; with bf16, DeepSpeed computes with "
            "parameters in bf16, and keeps fp32 copies"
        )
    if config.mixed_precision == "fp16" and is_host(torch.device(device_type)):
        return "mixed_precision=fp16 on a CPU, where DeepSpeed supports bf16 and fp32"
    return None


@contextlib.contextmanager
def setup_environment(ctx: DistContext) -> Generator[None]:
    """Set the variables that DeepSpeed reads during setup; its prints go to stderr."""
    # DeepSpeed prints to stdout, where a script may write results that another program reads.
    with rank_environment(ctx), contextlib.redirect_stdout(sys.stderr):
        yield


def rank_environment_if_missing(ctx: DistContext) -> AbstractContextManager[None]:
    """Set the variables of the rank, unless a launcher has set them.

    DeepSpeed reads them in each forward and step, too.
    """
    # Skipped under a launcher, because this runs in each forward and each step.
    if "LOCAL_RANK" in os.environ:
        return contextlib.nullcontext()
    return rank_environment(ctx)


@contextlib.contextmanager
def rank_environment(ctx: DistContext) -> Generator[None]:
    """Set the environment variables of this rank, and restore them afterwards."""
    # The port only names DeepSpeed's shared memory segment where no store listens on it.
    port = ctx.topology.main_port or os.getpid()
    variables = {
        "RANK": str(ctx.rank),
        "WORLD_SIZE": str(ctx.world_size),
        "LOCAL_RANK": str(ctx.local_rank),
        "MASTER_ADDR": ctx.topology.main_address or "localhost",
        "MASTER_PORT": str(port),
    }
    if is_host(ctx.device):
        # Otherwise DeepSpeed takes a GPU of the node, though the context is on the CPU.
        variables["DS_ACCELERATOR"] = "cpu"
    # Restored afterwards: user code and later contexts must not take them for a launcher's.
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def import_deepspeed(ctx: DistContext) -> Any:
    """Return the module, for the device of the context. Call it inside `setup_environment`.

    Raises:
        BackendError: The process has imported DeepSpeed for another type of device.
    """
    deepspeed: Any = importlib.import_module("deepspeed")
    # `get_accelerator` chooses once per process, at its first call.
    accelerator: Any = importlib.import_module("deepspeed.accelerator").get_accelerator()
    device_type = accelerator.device_name()
    if device_type != ctx.device.type:
        raise BackendError(
            "DeepSpeed was imported for another type of device, and a process has only one",
            got=f"`{device_type}` in DeepSpeed, `{ctx.device.type}` in the context",
            fix="import deepspeed after `faccel.wrap_optimizer`, or not at all",
        )
    return deepspeed


def op_names() -> list[str]:
    """Return the names of DeepSpeed's operators for this device. Call it after the import."""
    ops: Any = importlib.import_module("deepspeed.ops.op_builder.all_ops")
    return list(ops.ALL_OPS)
