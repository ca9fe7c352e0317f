"""The table of backends: every way to run a model, one row each; for authors of backends."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

import attrs
import torch.distributed as dist

from faccel.backends.deepspeed import availability as deepspeed
from faccel.backends.megatron import availability as megatron
from faccel.config import Config
from faccel.context import DistContext, require_context
from faccel.errors import BackendError, ConfigError
from faccel.mesh import MeshSpec

if TYPE_CHECKING:
    from faccel.protocols import Parallelism


def _refuse_nothing(config: Config, device_type: str) -> str | None:
    return None


def _no_replacement(config: Config, spec: MeshSpec) -> str | None:
    return None


@attrs.frozen(eq=False)
class Backend:
    """A row of the table.

    Args:
        parallelism: How the backend runs a model: the record, or `"module:attribute"`, which is
            imported when the row is chosen.
        serves: Whether the backend can run a mesh.
        probe: Returns why the backend cannot run in an environment, or None if it can.
        tested_on: The hardware on which this version was tested.
        written_for: Other hardware, on which it was not tested.
        needs: What must be installed, for the documentation.
        fix: What to do where `probe` returns a reason.
        refuse: `refuse(config, device_type)` returns why the backend cannot run a configuration,
            or None if it can.
        is_opt_in: Whether the row is chosen only if `strategy` names it, never by the mesh.
        replacement: `replacement(config, spec)` returns the name of the row that runs this
            configuration instead, or None.
    """

    parallelism: Parallelism | str
    serves: Callable[[MeshSpec], bool]
    probe: Callable[[Mapping[str, str]], str | None]
    tested_on: str
    written_for: str = ""
    needs: str = "torch"
    fix: str = "use another mesh"
    refuse: Callable[[Config, str], str | None] = _refuse_nothing
    is_opt_in: bool = False
    replacement: Callable[[Config, MeshSpec], str | None] = _no_replacement

    def load(self) -> Parallelism:
        """Return `parallelism`, imported if the row has only its name.

        Effects: ambient. Imports the module.
        """
        if not isinstance(self.parallelism, str):
            return self.parallelism
        module, _, attribute = self.parallelism.partition(":")
        return getattr(importlib.import_module(module), attribute)


def _always_runs(env: Mapping[str, str]) -> str | None:
    return None


def _probe_distributed(env: Mapping[str, str]) -> str | None:
    if dist.is_available():
        return None
    return "this torch was built without torch.distributed"


def _replace_zero_0(config: Config, spec: MeshSpec) -> str | None:
    """ZeRO-0 shards nothing: torch's replicas do the same without an engine."""
    if config.zero != 0:
        return None
    if spec.size > 1:
        return "ddp"
    return "single"


_GLOO = "CPU (gloo), simulated, pretended accelerator"
_NCCL = "CUDA (NCCL), TPU (tpu_dist), every other row of the table of devices"

# A row names its record as text: importing FSDP2, pipelining and the DeepSpeed engine takes longer
# than the rest of faccel, and a process runs one of them.
BACKENDS: Mapping[str, Backend] = MappingProxyType(
    {
        "single": Backend(
            "faccel.backends.single:SINGLE",
            serves=lambda spec: spec.size == 1,
            probe=_always_runs,
            tested_on="CPU, pretended accelerator",
            written_for="CUDA, TPU, MPS, every other row of the table of devices",
        ),
        "ddp": Backend(
            "faccel.backends.ddp:DDP",
            # Replicas only: every other axis of the mesh has size 1.
            serves=lambda spec: spec.size == spec.dp_replicate > 1,
            probe=_probe_distributed,
            tested_on=_GLOO,
            written_for=_NCCL,
        ),
        # Before `sharded`, which a pipeline uses inside each stage.
        "pipeline": Backend(
            "faccel.backends.pipeline:PIPELINE",
            serves=lambda spec: spec.pp > 1,
            probe=_probe_distributed,
            tested_on=_GLOO,
            written_for=_NCCL,
        ),
        "deepspeed": Backend(
            "faccel.backends.deepspeed.engine:DEEPSPEED",
            serves=lambda spec: spec.size == spec.dp_replicate,
            probe=deepspeed.probe,
            tested_on="CPU (gloo)",
            written_for="CUDA (NCCL), fp16 there",
            needs=f"`deepspeed{deepspeed.SUPPORTED}`, a C++ compiler",
            fix=deepspeed.INSTALL,
            refuse=deepspeed.refuse,
            is_opt_in=True,
            replacement=_replace_zero_0,
        ),
        "megatron": Backend(
            "faccel.backends.megatron.engine:MEGATRON",
            # Its groups: the axis `cp` needs TransformerEngine, and `ep` experts.
            serves=lambda spec: spec.dp_shard == spec.cp == spec.ep == 1,
            probe=megatron.probe,
            tested_on="CPU (gloo), with `torch.cuda` replaced by the tests",
            written_for="CUDA (NCCL), bf16 there",
            needs=f"`megatron-core{megatron.SUPPORTED}`",
            fix=megatron.INSTALL,
            refuse=megatron.refuse,
            is_opt_in=True,
        ),
        # Last, because it serves every mesh: the rows above take the simpler ones.
        "sharded": Backend(
            "faccel.backends.fsdp:FSDP",
            serves=lambda spec: True,
            probe=_probe_distributed,
            tested_on=_GLOO,
            written_for=_NCCL,
        ),
    }
)
"""The rows by name. Models run on the row that `strategy` names.

Without `strategy` they run on the first row that serves the mesh and is not opt-in.
"""


def choose(spec: MeshSpec, env: Mapping[str, str], config: Config, device_type: str) -> Parallelism:
    """Return how models run on a mesh.

    Effects: ambient. Imports the module of the chosen row.

    Args:
        spec: The mesh, filled.
        env: The environment.
        config: `strategy` names a row; None takes the first that serves the mesh.
        device_type: Type of this process's device.

    Raises:
        BackendError: No row serves the mesh, or the row cannot run here or with this configuration.
        ConfigError: `zero` is set without a strategy.
    """
    if config.strategy is None:
        _check_no_zero(config)
        name = _first_that_serves(spec)
    else:
        name = config.strategy
        _check_serves(name, spec)
    row = BACKENDS[name]
    _check_runs(name, row, env)
    # After `probe`: a missing package is the first thing to fix.
    reason = row.refuse(config, device_type)
    if reason:
        raise BackendError(
            f"the strategy `{name}` does not support this configuration",
            got=reason,
            fix="use another `mixed_precision`, device or strategy",
        )
    replacement = row.replacement(config, spec)
    if replacement is not None:
        row = BACKENDS[replacement]
    return row.load()


def _check_no_zero(config: Config) -> None:
    if config.zero is None:
        return
    source = config.sources.get("zero", "argument").partition(",")[0]
    raise ConfigError(
        "`zero` is set without `strategy`",
        got=f"zero={config.zero}, from the {source}",
        fix='write `strategy="deepspeed"` too, or `strategy="megatron"`',
    )


def _first_that_serves(spec: MeshSpec) -> str:
    for name, row in BACKENDS.items():
        if row.serves(spec) and not row.is_opt_in:
            return name
    raise BackendError(
        "no strategy of this version runs this mesh",
        got=str(spec),
        fix=f"use `dp_replicate={spec.size}`",
    )


def _check_serves(name: str, spec: MeshSpec) -> None:
    if not BACKENDS[name].serves(spec):
        raise BackendError(
            f"the strategy `{name}` does not run this mesh",
            got=str(spec),
            fix=f"use `dp_replicate={spec.size}`",
        )


def _check_runs(name: str, row: Backend, env: Mapping[str, str]) -> None:
    reason = row.probe(env)
    if reason:
        raise BackendError(f"the strategy `{name}` cannot run here", got=reason, fix=row.fix)


def table() -> str:
    """Return the strategies and their requirements as a Markdown table.

    Effects: pure.
    """
    lines = [
        "| strategy | chosen by | runs where there is | tested on "
        "| written for, not run on hardware by us |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, row in BACKENDS.items():
        chosen_by = "the mesh"
        if row.is_opt_in:
            chosen_by = f"`--strategy {name}`"
        cells = (f"`{name}`", chosen_by, row.needs, row.tested_on, row.written_for)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def use(ctx: DistContext, backend: Backend) -> DistContext:
    """Return the context with another backend, which may be missing from the table.

    Effects: ambient. Imports the module of a backend that is given as `"module:attribute"`.

    Args:
        ctx: From `init` or `simulate`.
        backend: How models are run.

    Raises:
        BackendError: The backend does not serve the mesh, or cannot run here.
    """
    require_context(ctx, "faccel.backends.use(ctx, backend)")
    parallelism = backend.load()
    reason = backend.probe(os.environ)
    if not backend.serves(ctx.mesh.spec):
        reason = f"it does not serve {ctx.mesh.spec}"
    if reason:
        raise BackendError(
            f"the strategy `{parallelism.name}` cannot run here", got=reason, fix=backend.fix
        )
    return attrs.evolve(ctx, parallelism=parallelism)
