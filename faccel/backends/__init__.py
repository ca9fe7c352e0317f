"""Every way to run a model, one row each; for authors of backends."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from types import MappingProxyType

import attrs
import torch.distributed as dist

from faccel.backends.ddp import DDP
from faccel.backends.pipeline import PIPELINE
from faccel.backends.sharded import SHARDED
from faccel.backends.single import SINGLE
from faccel.context import DistContext
from faccel.errors import BackendError
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
    """

    parallelism: Parallelism
    serves: Callable[[MeshSpec], bool]
    probe: Callable[[Mapping[str, str]], str | None]
    tested_on: str


def _probe(env: Mapping[str, str]) -> str | None:
    return None if dist.is_available() else "this torch was built without torch.distributed"


BACKENDS: Mapping[str, Backend] = MappingProxyType(
    {
        "single": Backend(SINGLE, lambda spec: spec.size == 1, lambda env: None, "CPU"),
        "ddp": Backend(DDP, lambda spec: spec.size == spec.dp_replicate > 1, _probe, "CPU (gloo), simulated"),
        "pipeline": Backend(PIPELINE, lambda spec: spec.pp > 1, _probe, "CPU (gloo), simulated"),
        "sharded": Backend(SHARDED, lambda spec: True, _probe, "CPU (gloo), simulated"),
    }
)
"""The first row that serves a mesh runs its models."""


def choose(spec: MeshSpec, env: Mapping[str, str]) -> Parallelism:
    """Return how the models of a mesh are run.

    Effects: pure.

    Raises:
        BackendError: No row serves the mesh, or the one that does cannot run here.
    """
    for name, row in BACKENDS.items():
        if row.serves(spec):
            reason = row.probe(env)
            if reason:
                raise BackendError(f"the strategy `{name}` cannot run here", saw=reason, fix="use another mesh")
            return row.parallelism
    raise BackendError(
        "no strategy of this version runs this mesh", saw=str(spec), fix=f"use `dp_replicate={spec.size}`"
    )


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
        raise BackendError(f"the strategy `{name}` cannot run here", saw=reason, fix="use another mesh")
    return attrs.evolve(ctx, parallelism=backend.parallelism)
