"""The variables that keep the ranks of one node on the loopback interface."""

from __future__ import annotations

import socket
from collections.abc import Mapping

ADDRESS = "127.0.0.1"
_INTERFACES = ("lo", "lo0")  # of Linux, of macOS and BSD


def loopback_variables(env: Mapping[str, str]) -> dict[str, str]:
    """Return the variables by which the ranks of one node listen on the loopback interface only.

    By default gloo, NCCL and TensorPipe listen on the address of a network card.

    Effects: ambient. Lists the network interfaces.

    Args:
        env: The environment. An interface that the user chose is kept.

    Examples:
        >>> loopback_variables({"GLOO_SOCKET_IFNAME": "eth0"})["NCCL_SOCKET_IFNAME"][:3]
        '=lo'
    """
    present = {name for _, name in socket.if_nameindex()}
    for interface in _INTERFACES:
        if interface in present:
            variables = {
                "GLOO_SOCKET_IFNAME": interface,
                "NCCL_SOCKET_IFNAME": f"={interface}",  # without `=` it is a prefix
                "TP_SOCKET_IFNAME": interface,
            }
            return {name: value for name, value in variables.items() if name not in env}
    return {}
