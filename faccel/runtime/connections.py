"""The connections of gloo groups: closing them ends the collectives of all ranks, at once.

gloo has no `abort`: a rank that waits in a collective waits for its peers, until a timeout of
minutes. It stops when a connection closes. A process group looks its backend up in every call, so a
group whose connections were closed gets a new backend, and DDP, FSDP2 and DTensor keep the group.
"""

from __future__ import annotations

import socket
from collections.abc import Generator
from contextlib import contextmanager, suppress
from datetime import timedelta

import attrs
import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

from faccel.comm.descriptors import DESCRIPTOR_FOLDER, link_of, open_sockets, ports_of

# torch keeps a backend for each type and never replaces one. Its last type is 6, `CUSTOM`, and it
# takes any number of 8 bits.
_FIRST_TYPE = 7
MAX_RENEWALS = 200
"""How often a group can get a new backend. Each one keeps two idle threads until the end."""


@attrs.define(eq=False)
class Connections:
    """The sockets of the process groups that were created inside of `recording`.

    Args:
        groups: The groups, in the order of their creation.
        store_port: The port of the store of the world, whose connections stay open.
    """

    groups: list[dist.ProcessGroup] = attrs.field(factory=list)
    store_port: int | None = None
    _links: dict[int, str] = attrs.field(factory=dict)
    _num_renewals: int = 0
    # Of the backends of all renewals.
    _options: dist.ProcessGroupGloo.Options | None = None

    @staticmethod
    def is_supported() -> bool:
        """Return whether this system lists the sockets of a process: Linux does."""
        return DESCRIPTOR_FOLDER.is_dir() and dist.is_gloo_available()

    @contextmanager
    def recording(self) -> Generator[None]:
        """Add the groups that the body creates."""
        table = c10d._world.pg_map  # pyright: ignore[reportPrivateUsage]
        groups_before, before = list(table), open_sockets()
        try:
            yield
        finally:
            for group in table:
                if not any(group is other for other in groups_before):
                    self.groups.append(group)
            # Also after an error: some groups may be connected.
            for descriptor, link in open_sockets().items():
                if before.get(descriptor) != link and self._is_of_group(descriptor):
                    self._links[descriptor] = link

    def _is_of_group(self, descriptor: int) -> bool:
        own_port, peer_port = ports_of(descriptor)
        # Pairs of sockets inside of the process have no port.
        return own_port is not None and self.store_port not in (own_port, peer_port)

    def close(self) -> None:
        """Close all connections: the collectives of this rank and of its peers raise."""
        for descriptor, link in self._links.items():
            if link_of(descriptor) == link:
                _shut_down(descriptor)
        self._links.clear()

    @property
    def can_renew(self) -> bool:
        """Whether the groups can get new backends."""
        return self._num_renewals < MAX_RENEWALS

    def renew(self, store: dist.Store, prefix: str, timeout: timedelta) -> None:
        """Connect all groups again. Collective.

        Args:
            store: A store of the world.
            prefix: Of the keys: equal on all ranks, and not used before.
            timeout: How long to wait for the peers, and of later collectives.
        """
        backend_type = dist.ProcessGroup.BackendType(_FIRST_TYPE + self._num_renewals)
        self._num_renewals += 1
        # Once for all groups: it looks at every socket of the process.
        with self.recording():
            for group in self.groups:
                keys = dist.PrefixStore(f"{prefix}/{group.group_name}", store)
                backend = self._create_backend(keys, group, timeout)
                group._register_backend(  # pyright: ignore[reportPrivateUsage]
                    torch.device("cpu"), backend_type, backend
                )

    def _create_backend(
        self, store: dist.Store, group: dist.ProcessGroup, timeout: timedelta
    ) -> dist.ProcessGroupGloo:
        rank, size = group.rank(), group.size()
        if self._options is None:
            backend = dist.ProcessGroupGloo(store, rank, size, timeout)
            self._options = backend.options
            return backend
        # With the device of the first one: each device has a thread that wakes up all the time,
        # and is kept until the end of the process.
        return dist.ProcessGroupGloo(store, rank, size, self._options)  # type: ignore[arg-type]


def _shut_down(descriptor: int) -> None:
    with suppress(OSError):  # gloo may close it at the same time
        connection = socket.socket(fileno=descriptor)
        try:
            # One that listens has no peer. gloo's thread would end the process without it.
            connection.getpeername()
            # Open for reading: a peer may still send the end of a collective, and would get an
            # error before it has read what this rank has sent.
            connection.shutdown(socket.SHUT_WR)
        finally:
            connection.detach()  # it belongs to gloo
