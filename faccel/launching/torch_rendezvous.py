"""The rendezvous of PyTorch's agents, without its open port on one node and without its pickles.

The stores of PyTorch's elastic rendezvous listen on all interfaces without a password, and each
agent unpickles what they hold, so that any client of a port could execute code.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Any

from torch.distributed import HashStore, TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStateError,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler, Token
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler
from torch.distributed.launcher.api import LaunchConfig

from faccel.launching.loopback import ADDRESS
from faccel.runtime.store_server import serve_store

ONE_NODE = "faccel-one-node"
"""Name of the rendezvous of one node in PyTorch's registry."""


class OneNodeRendezvous(RendezvousHandler):
    """The rendezvous of one node: the agent is alone, and the store of its ranks is on loopback.

    Args:
        run_id: Name of the run.
        port: Port of the store of the ranks; 0 takes a free one.
        on_started: Called again and again while the ranks run.
    """

    def __init__(
        self, run_id: str, port: int = 0, on_started: Callable[[], object] = lambda: None
    ) -> None:
        self._run_id = run_id
        self._port = port
        self._on_started = on_started
        self._server: TCPStore | None = None

    def get_backend(self) -> str:
        return ONE_NODE

    @property
    def use_agent_store(self) -> bool:
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        # A new store for each attempt: a script with `init_process_group` would read the addresses
        # of the ranks before a restart. The old one is closed first, because it may have the port.
        self._server = None
        self._server = serve_store(ADDRESS, self._port)
        address = RendezvousStoreInfo(ADDRESS, self._server.port)
        # What the agent stores is for itself alone, so it stays in its memory.
        return RendezvousInfo(HashStore(), 0, 1, address)

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        pass

    def num_nodes_waiting(self) -> int:
        self._on_started()  # the agent asks while it monitors the ranks
        return 0

    def get_run_id(self) -> str:
        return self._run_id

    def shutdown(self) -> bool:
        self._server = None
        return True


def _create_one_node(parameters: RendezvousParameters) -> RendezvousHandler:
    return OneNodeRendezvous(parameters.run_id, on_started=parameters.config["on_started"])


def register_one_node() -> None:
    """Add `ONE_NODE` to PyTorch's registry, for `elastic_launch`.

    Effects: ambient.
    """
    rendezvous_handler_registry.register(ONE_NODE, _create_one_node)


_TORCH_MODULE = "torch.distributed.elastic.rendezvous.dynamic_rendezvous"
_STATE_CLASSES = frozenset(
    {
        (_TORCH_MODULE, "_RendezvousState"),
        (_TORCH_MODULE, "_NodeDesc"),
        ("datetime", "datetime"),
        ("datetime", "timedelta"),
        ("datetime", "timezone"),
    }
)


class _StateUnpickler(pickle.Unpickler):
    """Raises for a pickle with anything but the state of a rendezvous, before it is executed."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _STATE_CLASSES:
            raise RendezvousStateError(f"the state of the rendezvous contains {module}.{name}")
        return super().find_class(module, name)


def check_state(state: bytes) -> None:
    """Raise for a pickle that is not the state of PyTorch's elastic rendezvous.

    Effects: pure. Executes nothing of the pickle.

    Raises:
        RendezvousStateError: The pickle contains another class or function, or is damaged.
    """
    try:
        _StateUnpickler(io.BytesIO(state)).load()
    except RendezvousStateError:
        raise
    # The pickle is of unknown origin, so that its errors may have any class.
    except Exception as error:
        raise RendezvousStateError(f"the state of the rendezvous is damaged: {error}") from None


class CheckedBackend(C10dRendezvousBackend):
    """The state in a store, checked before PyTorch unpickles it."""

    def get_state(self) -> tuple[bytes, Token] | None:
        result = super().get_state()
        if result is not None:
            check_state(result[0])
        return result

    def set_state(
        self, state: bytes, token: Token | None = None
    ) -> tuple[bytes, Token, bool] | None:
        result = super().set_state(state, token)
        if result is not None:
            check_state(result[0])
        return result


class ElasticRendezvous(DynamicRendezvousHandler):
    """PyTorch's elastic rendezvous with one port: the ranks use the store of the rendezvous."""

    @property
    def use_agent_store(self) -> bool:
        return True

    def _create_tcp_store_server(self, master_addr: str, master_port: int) -> TCPStore:
        # PyTorch would serve a second store for the ranks, on all interfaces.
        assert isinstance(self._store, TCPStore)  # the argument of `elastic_rendezvous`
        return self._store

    def next_rendezvous(self) -> RendezvousInfo:
        info = super().next_rendezvous()
        assert isinstance(self._store, TCPStore)
        address = RendezvousStoreInfo(self._store.host, self._store.port)
        return RendezvousInfo(info.store, info.rank, info.world_size, address)


def static_rendezvous(config: LaunchConfig, run_id: str) -> RendezvousHandler:
    """Return PyTorch's rendezvous of nodes with fixed ranks, which stores JSON.

    In this process it shares the server of `join_nodes`, which listens on the same port.

    Effects: ambient.
    """
    parameters = RendezvousParameters(
        backend=config.rdzv_backend,
        endpoint=config.rdzv_endpoint,
        run_id=run_id,
        min_nodes=config.min_nodes,
        max_nodes=config.max_nodes,
        local_addr=config.local_addr,
        **config.rdzv_configs,
    )
    return get_rendezvous_handler(parameters)


def elastic_rendezvous(config: LaunchConfig, run_id: str, store: TCPStore) -> RendezvousHandler:
    """Return the rendezvous of nodes that may join and leave.

    Effects: ambient.

    Args:
        config: The launch.
        run_id: Name of the run, the same on all nodes.
        store: The store at the address of the rendezvous.
    """
    return ElasticRendezvous.from_backend(
        run_id, store, CheckedBackend(store, run_id), config.min_nodes, config.max_nodes
    )
