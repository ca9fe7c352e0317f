"""The process group of debug mode: ranks compare every call of c10d before it begins.

Debug mode compares the calls of faccel's own functions in `DebugCollectives`. What FSDP2, DDP,
DTensor and the user's `torch.distributed` call goes through this group.
"""

# pyright: reportIncompatibleMethodOverride=false

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Protocol

import attrs
import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

from faccel.comm.call_exchange import CallExchange
from faccel.comm.compared_call import compared_call
from faccel.comm.pack import describe

BACKEND = "faccel_debug"


class _GroupOptions(Protocol):
    """The fields of c10d's `_DistributedBackendOptions` that are read here."""

    store: dist.Store
    timeout: timedelta
    group_id: str
    group_size: int
    group_rank: int
    global_ranks_in_group: list[int]


@attrs.frozen(eq=False)
class DebugOptions:
    """The `pg_options` of `init_process_group`.

    Args:
        backend: The backend that communicates, such as `"cpu:gloo,cuda:nccl"`.
        device: The accelerator of this rank; None on the CPU.
        exchange: Compares the calls.
    """

    backend: str
    device: torch.device | None
    exchange: CallExchange


# A collective of `DebugCollectives` has been compared already. One flag per thread.
_compared = threading.local()


@contextmanager
def already_compared() -> Generator[None]:
    """Let the groups of this module pass the calls of this thread in the body."""
    _compared.depth = getattr(_compared, "depth", 0) + 1
    try:
        yield
    finally:
        _compared.depth -= 1


def _shapes(values: object) -> str:
    """Return shapes and dtypes of a tensor, or of lists of them."""
    if isinstance(values, torch.Tensor):
        return describe([values])
    if isinstance(values, Sequence):
        return ", ".join(_shapes(value) for value in values)  # pyright: ignore
    return ""


def _reduction(options: object) -> str:
    op = getattr(options, "reduceOp", dist.ReduceOp.SUM)
    return str(getattr(op, "op", op)).rpartition(".")[2].lower()


# What must agree between ranks, for the arguments of each method of a process group.
_Detail = Callable[..., str]


def _reduced(tensors: object, options: object = None) -> str:
    return f"{_reduction(options)}, {_shapes(tensors)}"


def _reduced_to(tensors: object, options: Any) -> str:
    return f"{_reduction(options)}, to {options.rootRank}, {_shapes(tensors)}"


def _from_root(tensors: object, options: Any) -> str:
    return f"from {options.rootRank}, {_shapes(tensors)}"


def _scattered(outputs: object, inputs: object, options: Any) -> str:
    return f"from {options.rootRank}, {_shapes(outputs)}"


def _gathered_to(outputs: object, inputs: object, options: Any) -> str:
    return f"to {options.rootRank}, {_shapes(inputs)}"


def _gathered(outputs: object, inputs: object, options: object = None) -> str:
    return _shapes(inputs)


def _reduce_scattered(outputs: object, inputs: object, options: object = None) -> str:
    return f"{_reduction(options)}, {_shapes(inputs)}"


def _exchanged(*arguments: object, **options: object) -> str:
    return ""  # ranks may send different numbers of rows


_DETAILS: dict[str, tuple[str, _Detail]] = {
    "allreduce": ("all_reduce", _reduced),
    "allreduce_coalesced": ("all_reduce", _reduced),
    "reduce": ("reduce", _reduced_to),
    "broadcast": ("broadcast", _from_root),
    "allgather": ("all_gather", _gathered),
    "allgather_coalesced": ("all_gather", _gathered),
    "all_gather_single": ("all_gather", _gathered),
    "all_gather_single_coalesced": ("all_gather", _gathered),
    "gather": ("gather", _gathered_to),
    "scatter": ("scatter", _scattered),
    "reduce_scatter": ("reduce_scatter", _reduce_scattered),
    "reduce_scatter_single": ("reduce_scatter", _reduce_scattered),
    "reduce_scatter_single_coalesced": ("reduce_scatter", _reduce_scattered),
    "alltoall": ("all_to_all", _exchanged),
    "all_to_all_single": ("all_to_all", _exchanged),
    "barrier": ("barrier", _exchanged),
}
# Messages concern two ranks, and have their own order on each.
_PASSED_ON = ("send", "recv", "recv_anysource", "_start_coalescing", "_end_coalescing", "abort")
# The names before PyTorch 2.13.
_OLD_NAMES = {
    "_allgather_base": "all_gather_single",
    "_reduce_scatter_base": "reduce_scatter_single",
    "alltoall_base": "all_to_all_single",
    "allgather_into_tensor_coalesced": "all_gather_single_coalesced",
    "reduce_scatter_tensor_coalesced": "reduce_scatter_single_coalesced",
}


class DebugGroup(dist.ProcessGroup):
    """A process group that compares the calls of its ranks, and passes them on to another one.

    Args:
        inner: The group that communicates.
        options: Those of the default group.
        name: The name of the group, equal on all its ranks.
        ranks: The ranks of the group, as ranks of the world.
    """

    def __init__(
        self, inner: dist.ProcessGroup, options: DebugOptions, name: str, ranks: Sequence[int]
    ) -> None:
        super().__init__(inner.rank(), inner.size())  # pyright: ignore[reportCallIssue]
        self.options = options
        self._inner = inner
        self._name = name
        self._ranks = tuple(ranks)

    def getBackendName(self) -> str:  # noqa: N802 (a name of c10d)
        return BACKEND

    @property
    def group_name(self) -> str:
        """Its name in PyTorch's registry, which C++ sets only for groups with a C++ backend."""
        return c10d._world.pg_names[self]  # pyright: ignore[reportPrivateUsage]

    def set_timeout(self, timeout: timedelta) -> None:
        self._inner.set_timeout(timeout)

    def shutdown(self) -> None:
        """Do nothing: `destroy_process_group` shuts the inner group down, too."""

    def _compare(self, op: str, detail: str) -> None:
        if getattr(_compared, "depth", 0):
            return
        call = compared_call(op, detail)
        # Ranks that use different groups of the same ranks disagree, too.
        call = attrs.evolve(call, op=f"{call.op} in group {self._name}")
        own_rank = self._ranks[self._inner.rank()]
        self.options.exchange.compare(call, self._ranks, own_rank, self._name)


def _comparing(name: str, detail_name: str) -> Callable[..., object]:
    op, detail = _DETAILS[detail_name]

    def call(self: DebugGroup, *args: object, **kwargs: object) -> object:
        self._compare(op, detail(*args, **kwargs))  # pyright: ignore[reportPrivateUsage]
        return getattr(self._inner, name)(*args, **kwargs)  # pyright: ignore[reportPrivateUsage]

    return call


def _passing_on(name: str) -> Callable[..., object]:
    def call(self: DebugGroup, *args: object, **kwargs: object) -> object:
        return getattr(self._inner, name)(*args, **kwargs)  # pyright: ignore[reportPrivateUsage]

    return call


# One method for each of c10d's, which differ in nothing but what they compare.
for _name in _DETAILS:
    setattr(DebugGroup, _name, _comparing(_name, _name))
for _old, _name in _OLD_NAMES.items():
    setattr(DebugGroup, _old, _comparing(_old, _name))
for _name in _PASSED_ON:
    setattr(DebugGroup, _name, _passing_on(_name))


def _create(group: _GroupOptions, options: DebugOptions | None) -> DebugGroup:
    """Create a group for `init_process_group`, `new_group` or `init_device_mesh`."""
    is_default = options is not None
    if options is None:
        # `new_group` passes no options: take those of the default group.
        default = dist.group.WORLD
        assert isinstance(default, DebugGroup)
        options = default.options
    # PyTorch makes a group with the backends of all devices in this function only.
    inner, _ = c10d._new_process_group_helper(  # pyright: ignore[reportPrivateUsage]
        group.group_size,
        group.group_rank,
        list(group.global_ranks_in_group),
        dist.Backend(options.backend),
        group.store,
        group_name=f"{group.group_id}_inner",  # type: ignore[arg-type]
        timeout=group.timeout,
        device_id=options.device if is_default else None,
    )
    ranks = group.global_ranks_in_group or range(group.group_size)
    return DebugGroup(inner, options, group.group_id, ranks)  # type: ignore[arg-type]


def register_backend(device_type: str) -> str:
    """Register the backend with c10d, for all devices that have a library; return its name.

    Effects: ambient. Does nothing if it is registered already.

    Args:
        device_type: Type of the device of this process, whose library is registered.
    """
    device_types = {"cpu", device_type}
    # c10d makes it the default of a type that has none, before a plugin registers its library.
    for other_type, library in dist.Backend.default_device_backend_map.items():
        if library != dist.Backend.FAKE:
            device_types.add(other_type)
    # Fields of the class, because this module may be reloaded.
    if not device_types <= set(dist.Backend.backend_capability.get(BACKEND, ())):
        dist.Backend.register_backend(
            BACKEND, _create, extended_api=True, devices=sorted(device_types)
        )
    return BACKEND
