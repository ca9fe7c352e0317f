"""The store of the world after the end of its server: an error, and no lines from C++."""

from datetime import timedelta

import pytest
import torch.distributed as dist

from faccel.comm.world_store import WorldStore

REQUESTS = {
    "set": lambda store: store.set("key", "value"),
    "get": lambda store: store.get("key"),
    "check": lambda store: store.check(["key"]),
    "add": lambda store: store.add("number", 1),
    "delete_key": lambda store: store.delete_key("key"),
    "wait": lambda store: store.wait(["key"]),
}


def tcp_store(port, *, is_master):
    return dist.TCPStore(
        "127.0.0.1",
        port,
        is_master=is_master,
        wait_for_workers=False,
        timeout=timedelta(seconds=60),
    )


@pytest.mark.parametrize("request_name", REQUESTS)
def test_a_request_after_the_end_of_the_server_raises_and_prints_nothing(request_name, capfd):
    server = tcp_store(0, is_master=True)
    store = WorldStore(dist.PrefixStore("prefix", tcp_store(server.port, is_master=False)))
    other = tcp_store(server.port, is_master=False)
    store.set("key", "value")
    assert other.get("prefix/key") == b"value"
    assert not store.has_ended()
    del server
    assert store.has_ended()
    with pytest.raises(dist.DistNetworkError, match="has ended"):
        REQUESTS[request_name](store)
    assert capfd.readouterr().err == ""


def test_a_store_without_a_connection_gets_every_request():
    inner = dist.HashStore()
    store = WorldStore(inner)
    store.set("key", "value")
    assert (store.get("key"), inner.get("key")) == (b"value", b"value")
    assert store.check(["key"])
    assert store.add("number", 2) == inner.add("number", 0) == 2
    assert store.delete_key("key")
    assert not inner.check(["key"])
    assert not store.has_ended()
