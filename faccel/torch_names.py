"""Functions of PyTorch whose names differ between its versions, 2.11 and later."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

FLIGHT_RECORDER_SIZES = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")
"""The variables for the number of collectives that PyTorch's flight recorder holds; 0 is off.

The second one is the older name, and the first one precedes it. Without both PyTorch holds 2000.
"""

# PyTorch 2.13 renamed it and warns about the old name.
_name = "all_gather_single"
if not hasattr(dist, _name):
    _name = "all_gather_into_tensor"
all_gather_single = getattr(dist, _name)

# PyTorch 2.12 added it.
_foreach_clone = getattr(cast("Any", torch), "_foreach_clone", None)


def clone_all(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return a copy of each tensor, in one call where PyTorch has it.

    Effects: pure.
    """
    if _foreach_clone is None:
        return [tensor.clone() for tensor in tensors]
    return list(_foreach_clone(list(tensors)))


def fsdp_param_groups(state: Any) -> Sequence[Any]:
    """Return FSDP2's records of the parameters of one unit.

    Effects: pure.

    Args:
        state: The `FSDPState` of the unit.
    """
    # PyTorch 2.12 allows several for each unit.
    if hasattr(state, "_fsdp_param_groups"):
        return state._fsdp_param_groups
    if state._fsdp_param_group is None:  # a unit without parameters
        return ()
    return (state._fsdp_param_group,)


def reset_fsdp_iteration(root_state: Any) -> None:
    """Forget an unfinished forward or backward of an FSDP2 model; its parameters are sharded.

    Effects: updates root_state. Not collective.

    Args:
        root_state: The `FSDPState` of the root.
    """
    if hasattr(root_state, "_reset_iter_state"):
        root_state._reset_iter_state()
        return
    from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState

    # PyTorch 2.11: what `_reset_iter_state` of PyTorch 2.13 does.
    comm = root_state._comm_ctx
    stream = root_state._device_handle.current_stream()
    for state in (comm.all_gather_state, comm.reduce_scatter_state):
        if state is not None and state.event is not None:
            stream.wait_event(state.event)
    comm.all_gather_state = comm.reduce_scatter_state = None
    comm.post_forward_order.clear()
    for state in root_state._state_ctx.all_states:
        state._modules_to_run_forward.clear()
        state._training_state = TrainingState.IDLE
        for group in fsdp_param_groups(state):
            _reset_group(group, stream)
            group._training_state = TrainingState.IDLE
    root_state._state_ctx.iter_forward_root = None
    root_state._state_ctx.post_backward_final_callback_queued = False


def _reset_group(group: Any, stream: Any) -> None:
    for event in (
        getattr(group._all_gather_result, "all_gather_event", None),
        group._post_reduce_event,
        getattr(group._all_reduce_state, "event", None),
    ):
        if event is not None:
            stream.wait_event(event)
    if group._reshard_after_forward_event is not None:
        group._wait_all_gather_streams_on_event(group._reshard_after_forward_event)
    group._all_gather_result = group._post_reduce_event = None
    group._all_reduce_state = group._reshard_after_forward_event = None
    group._partial_reduce_output = None
    group._post_forward_indices.clear()
    group._to_sharded()


def sequence_number(group: dist.ProcessGroup) -> int | None:
    """Return how many collectives of a group this rank has begun, None if it does not count them.

    Effects: pure.
    """
    try:
        return group._get_sequence_number_for_group()  # pyright: ignore
    except RuntimeError:
        return None


def names_of_groups() -> list[tuple[dist.ProcessGroup, str]]:
    """Return the process groups of this process with their names in PyTorch's registry.

    Effects: pure.
    """
    # A copy in one step of the interpreter: another thread may be creating a group.
    return list(c10d._world.pg_names.items())  # pyright: ignore


def flight_record() -> Sequence[Mapping[str, Any]]:
    """Return the last collectives that PyTorch's flight recorder holds, oldest first.

    Effects: pure. Empty where it does not record: if `FLIGHT_RECORDER_SIZES` was 0 when the first
    group was created, or in a build without it.
    """
    dump = getattr(torch._C._distributed_c10d, "_dump_fr_trace_json", None)  # pyright: ignore
    if dump is None:
        return []
    entries = json.loads(dump()).get("entries", [])
    return [entry for entry in entries if not entry["is_p2p"]]
