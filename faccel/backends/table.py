"""Every way to run a model, one row each; for authors of backends."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from types import MappingProxyType

import attrs
import torch.distributed as dist

from faccel.backends.ddp import DDP
from faccel.backends.deepspeed import availability as deepspeed
from faccel.backends.deepspeed.engine import DEEPSPEED
from faccel.backends.fsdp import FSDP
from faccel.backends.pipeline import PIPELINE
from faccel.backends.single import SINGLE
from faccel.config import Config
from faccel.context import DistContext
from faccel.errors import BackendError, ConfigError
from faccel.mesh import MeshSpec
from faccel.protocols import Parallelism


@attrs.frozen(eq=False)
class Backend:
    """A row of the table.

    Args:
        parallelism: How it runs a model.
        serves: Whether it is the one for a mesh.
        probe: Why it cannot run in an environment; None if it can.
        tested_on: What it has been run on by us.
        written_for: What it has been written for, and not been run on by us.
        needs: What has to be installed for it, for people.
        fix: What to do where it cannot run.
        refuse: `refuse(config, device_type)`: why it cannot do what a configuration asks for; None if it can.
        is_asked_for: Whether it runs only where `strategy` names it.
        instead: `instead(config, spec)`: the row that runs what this one leaves to another; None if it runs it itself.
    """

    parallelism: Parallelism
    serves: Callable[[MeshSpec], bool]
    probe: Callable[[Mapping[str, str]], str | None]
    tested_on: str
    written_for: str = ""
    needs: str = "torch"
    fix: str = "use another mesh"
    refuse: Callable[[Config, str], str | None] = lambda config, device_type: None
    is_asked_for: bool = False
    instead: Callable[[Config, MeshSpec], str | None] = lambda config, spec: None


def _probe(env: Mapping[str, str]) -> str | None:
    return None if dist.is_available() else "this torch was built without torch.distributed"


def _replicas(config: Config, spec: MeshSpec) -> str | None:
    """ZeRO-0 shares nothing: its replicas are torch's."""
    return ("ddp" if spec.size > 1 else "single") if config.zero == 0 else None


_GLOO, _NCCL = "CPU (gloo), simulated", "CUDA (NCCL), XPU"
BACKENDS: Mapping[str, Backend] = MappingProxyType(
    {
        "single": Backend(
            SINGLE, lambda spec: spec.size == 1, lambda env: None, "CPU", "CUDA, XPU, MPS"
        ),
        "ddp": Backend(DDP, lambda spec: spec.size == spec.dp_replicate > 1, _probe, _GLOO, _NCCL),
        "pipeline": Backend(PIPELINE, lambda spec: spec.pp > 1, _probe, _GLOO, _NCCL),
        "deepspeed": Backend(
            DEEPSPEED,
            lambda spec: spec.size == spec.dp_replicate,
            deepspeed.probe,
            "CPU (gloo)",
            "CUDA (NCCL), fp16 there",
            needs=f"`deepspeed{deepspeed.WANTED}`, a C++ compiler",
            fix=deepspeed.HOW,
            refuse=deepspeed.refuse,
            is_asked_for=True,
            instead=_replicas,
        ),
        "sharded": Backend(FSDP, lambda spec: True, _probe, _GLOO, _NCCL),
    }
)
"""The row that `strategy` names, or the first other one that serves a mesh, runs its models."""


def choose(spec: MeshSpec, env: Mapping[str, str], config: Config, device_type: str) -> Parallelism:
    """Return how models are run.

    Effects: pure.

    Args:
        spec: The mesh, filled.
        env: The environment.
        config: What was asked for.
        device_type: Of the device of this process.

    Raises:
        BackendError: No row serves the mesh, or the one that does cannot run here, or not so.
        ConfigError: A stage of an engine, and no engine.
    """
    name = config.strategy
    if name is None and config.zero is not None:
        got = f"zero={config.zero}, from the {config.sources.get('zero', 'argument').partition(',')[0]}"
        raise ConfigError(
            "`zero` is a stage of an engine", got=got, fix='write `strategy="deepspeed"` too'
        )
    if name is None:
        name = next(
            (each for each, row in BACKENDS.items() if row.serves(spec) and not row.is_asked_for),
            None,
        )
    if name is None or not BACKENDS[name].serves(spec):
        what = (
            "no strategy of this version runs this mesh"
            if name is None
            else f"`{name}` does not run this mesh"
        )
        raise BackendError(what, got=str(spec), fix=f"use `dp_replicate={spec.size}`")
    row = BACKENDS[name]
    reason = row.probe(env)
    if reason:
        raise BackendError(f"the strategy `{name}` cannot run here", got=reason, fix=row.fix)
    reason = row.refuse(config, device_type)
    if reason:
        fix = "use another `mixed_precision`, device or strategy"
        raise BackendError(f"the strategy `{name}` cannot do this", got=reason, fix=fix)
    return BACKENDS[row.instead(config, spec) or name].parallelism


def table() -> str:
    """Return what runs where as a Markdown table.

    Effects: pure, but for a look at what is installed.
    """
    head = "| strategy | chosen by | runs where there is | tested on | written for, not run on hardware by us |"
    asked = {
        name: f"`--strategy {name}`" if row.is_asked_for else "the mesh"
        for name, row in BACKENDS.items()
    }
    rows = [
        f"| `{name}` | {asked[name]} | {row.needs} | {row.tested_on} | {row.written_for} |"
        for name, row in BACKENDS.items()
    ]
    return "\n".join([head, "| --- | --- | --- | --- | --- |", *rows])


def use(ctx: DistContext, backend: Backend) -> DistContext:
    """Return the context with a backend of your own, which need not stand in the table.

    Effects: pure.

    Args:
        ctx: From `init` or `simulate`.
        backend: How models are run.

    Raises:
        BackendError: It does not serve the mesh, or cannot run here.
    """
    reason = None if backend.serves(ctx.mesh.spec) else f"it does not serve {ctx.mesh.spec}"
    reason = reason or backend.probe(os.environ)
    if reason:
        name = backend.parallelism.name
        raise BackendError(
            f"the strategy `{name}` cannot run here", got=reason, fix="use another mesh"
        )
    return attrs.evolve(ctx, parallelism=backend.parallelism)
