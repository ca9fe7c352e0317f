"""The parallel groups of Megatron-core, from the mesh of a context."""

from __future__ import annotations

import importlib
import math
from typing import Any

from faccel import device_table
from faccel.backends.default_group import ensure_process_group
from faccel.context import DistContext
from faccel.errors import BackendError


def start(ctx: DistContext) -> None:
    """Create the parallel groups, and seed the generators of tensor parallel layers.

    Models of Megatron-core ask for both when they are built.

    Effects: ambient; collective. The groups end with the context.

    Raises:
        BackendError: Megatron-core has groups already, or runs on another device.
    """
    check_device(ctx)
    state = parallel_state()
    # Those of another context, or of the script; their sizes may differ.
    if state.model_parallel_is_initialized():
        raise BackendError(
            "Megatron-core has parallel groups already, and a process has one set of them",
            got="`parallel_state.initialize_model_parallel` was called before `faccel.init`",
            fix="leave that call out, or call `faccel.shutdown(ctx)` of the first context before "
            "the second `faccel.init`",
        )
    ensure_process_group(ctx)
    spec = ctx.mesh.spec
    # Its order of ranks and the mesh's are the same: `tp` varies fastest, and `pp` slowest.
    state.initialize_model_parallel(
        tensor_model_parallel_size=spec.tp,
        pipeline_model_parallel_size=spec.pp,
        order="tp-cp-ep-dp-pp",
        distributed_timeout_minutes=max(1, math.ceil(min(ctx.config.timeout_s, 1e6) / 60)),
        # Only its checkpoint formats use them.
        create_gloo_process_groups=False,
    )
    # Its globals outlive the process group, and the next context would use them.
    ctx.lifetime.on_close(state.destroy_model_parallel)
    random: Any = importlib.import_module("megatron.core.tensor_parallel.random")
    # As its training scripts do: stages draw different numbers, and the ranks of `tp` too.
    stage = spec.coordinates(ctx.rank)["pp"]
    random.model_parallel_cuda_manual_seed(ctx.config.seed + 100 * stage)


def parallel_state() -> Any:
    """Return the module of Megatron-core with the groups of this process."""
    return importlib.import_module("megatron.core.parallel_state")


def check_device(ctx: DistContext) -> None:
    """Raise unless Megatron-core computes on the device of the context.

    Raises:
        BackendError: It does not.
    """
    # Megatron-core allocates there everywhere, whatever the device of the context is.
    device_type = device_table.type_of_current_cuda_device()
    if device_type != ctx.device.type:
        raise BackendError(
            "Megatron-core runs on CUDA devices only",
            got=f"a context on {ctx.device.type}; torch.cuda: {device_type}",
            fix='use a node with a GPU, or leave `strategy="megatron"` out',
        )


def check_started(ctx: DistContext) -> None:
    """Raise unless the groups of Megatron-core are those that `start` has created.

    Raises:
        BackendError: They are missing, or have other sizes.
    """
    if ctx.topology.source == "simulated":
        raise BackendError(
            "Megatron-core does not run in a simulated world: it stores global state in the "
            "process, and simulated ranks are threads",
            fix="run the ranks as processes, with `faccel launch` or `faccel.launch`",
        )
    state = parallel_state()
    if not state.model_parallel_is_initialized():
        raise BackendError(
            "the parallel groups of Megatron-core are missing",
            got="`wrap` without them",
            fix='write `ctx = faccel.init(strategy="megatron")` before you build the model',
        )
    tp = state.get_tensor_model_parallel_world_size()
    pp = state.get_pipeline_model_parallel_world_size()
    spec = ctx.mesh.spec
    if (tp, pp) != (spec.tp, spec.pp):
        raise BackendError(
            "the parallel groups of Megatron-core are not those of the mesh",
            got=f"groups of tp={tp}, pp={pp}; mesh {spec}",
            fix="leave `initialize_model_parallel` out: `faccel.init` creates the groups",
        )
