"""Helper: the listening TCP sockets of a process and of all processes that it started.

As a script, it prints those of the parent of its parent: of the launcher, if a rank starts it.
"""

import ipaddress
import json
import os
import pathlib
import sys

LISTEN = "0A"  # of Linux' tcp_states.h


def parent(pid):
    """Return the parent of a process, 0 if it has ended."""
    try:
        text = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    return int(text.rpartition(")")[2].split()[1])


def tree(root):
    """Return the ids of a process and of its descendants."""
    parents = {int(name): parent(name) for name in os.listdir("/proc") if name.isdecimal()}
    pids, size = {root}, 0
    while len(pids) > size:
        size = len(pids)
        pids |= {pid for pid, of in parents.items() if of in pids}
    return pids


def inodes(pid):
    """Return the sockets that a process has open, by their names in `/proc`."""
    names = set()
    try:
        for path in pathlib.Path(f"/proc/{pid}/fd").iterdir():
            target = os.readlink(path)
            if target.startswith("socket:"):
                names.add(target[len("socket:[") : -1])
    except OSError:  # the process or the descriptor has gone
        pass
    return names


def address(text):
    """Return `(host, port)` of an address in `/proc/net/tcp` or `/proc/net/tcp6`."""
    host, port = text.split(":")
    # Each 32-bit word is in the byte order of the processor.
    words = [bytes.fromhex(host[i : i + 8]) for i in range(0, len(host), 8)]
    if sys.byteorder == "little":
        words = [word[::-1] for word in words]
    parsed = ipaddress.ip_address(b"".join(words))
    return str(getattr(parsed, "ipv4_mapped", None) or parsed), int(port, 16)


def listening(pid):
    """Return the addresses on which one process listens, as `(host, port)`."""
    own, found = inodes(pid), set()
    for family in ("tcp", "tcp6"):
        try:
            lines = pathlib.Path(f"/proc/{pid}/net/{family}").read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if fields[3] == LISTEN and fields[9] in own:
                found.add(address(fields[1]))
    return found


def listening_tree(root):
    """Return the addresses on which a process or one of its descendants listens."""
    found = set()
    for pid in tree(root):
        found |= listening(pid)
    return found


if __name__ == "__main__":
    print(json.dumps(sorted(listening_tree(parent(os.getppid())))))
