"""Whether DeepSpeed can run here: installed, of a version that we know, with a compiler for its operators."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import os
import shutil
import sys
from collections.abc import Generator, Mapping
from contextlib import AbstractContextManager
from typing import Any

from faccel.config import Config
from faccel.context import DistContext
from faccel.errors import BackendError

WANTED = ">=0.19,<0.20"
HOW = (
    f'run `DS_BUILD_OPS=0 pip install --no-build-isolation "deepspeed{WANTED}"`, and have a C++ compiler as `c++` '
    "on the PATH (`apt install g++`): DeepSpeed builds its operators when they are first used"
)


def probe(env: Mapping[str, str]) -> str | None:
    """Return why DeepSpeed cannot run here; None if it can. Effects: pure, but for a look at what is installed."""
    try:
        found = importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        return "deepspeed is not installed"
    if found.split(".")[:2] != ["0", "19"]:
        return f"deepspeed {found} is installed, and this version of faccel needs {WANTED}"
    compiler = env.get("CXX") or "c++"
    if shutil.which(compiler, path=env.get("PATH")) is None:
        return f"there is no C++ compiler for its operators: `{compiler}` is not on the PATH"
    return None


def refuse(config: Config, device_type: str) -> str | None:
    """Return why DeepSpeed cannot do what a configuration asks for; None if it can. Effects: pure."""
    if config.mixed_precision == "fp16" and device_type == "cpu":
        return "mixed_precision=fp16 on a CPU, where DeepSpeed has bf16 and fp32 only"
    return None


@contextlib.contextmanager
def surroundings(ctx: DistContext) -> Generator[None]:
    """Let DeepSpeed find what it looks up itself while it begins. What it prints goes to stderr."""
    with place(ctx), contextlib.redirect_stdout(sys.stderr):
        yield


def place_if_missing(ctx: DistContext) -> AbstractContextManager[None]:
    """Make a context for while it runs, where no launcher has said in the environment which rank this is."""
    return contextlib.nullcontext() if "LOCAL_RANK" in os.environ else place(ctx)


@contextlib.contextmanager
def place(ctx: DistContext) -> Generator[None]:
    """Say in the environment which rank this is; it is put back."""
    here = {
        "RANK": ctx.rank,
        "WORLD_SIZE": ctx.world_size,
        "LOCAL_RANK": ctx.local_rank,
        "MASTER_ADDR": ctx.topology.main_address or "localhost",
        "MASTER_PORT": ctx.topology.main_port
        or os.getpid(),  # a name for its shared memory, where nobody listens
    }
    wanted = {name: str(value) for name, value in here.items()}
    if ctx.device.type == "cpu":
        wanted["DS_ACCELERATOR"] = "cpu"
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def imported(ctx: DistContext) -> Any:
    """Return the module, which runs on the device of the context. Call it inside of `surroundings`."""
    deepspeed: Any = importlib.import_module("deepspeed")
    has = importlib.import_module("deepspeed.accelerator").get_accelerator().device_name()
    if has != ctx.device.type:
        raise BackendError(
            "DeepSpeed was imported for another kind of device, of which a process has one",
            got=f"`{has}` there, `{ctx.device.type}` here",
            fix="import deepspeed after `faccel.wrap_optimizer`, or not at all",
        )
    return deepspeed
