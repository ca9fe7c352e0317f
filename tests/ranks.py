"""Real processes for tests: ranks that meet over gloo.

They are forked from a server that has imported torch and computed nothing: a fork of the test process itself would
inherit its OpenMP threads, and hang in its first parallel region.
"""

import multiprocessing
import os
import pickle
import sys
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist

import faccel

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["torch", "torch._dynamo", "sklearn.datasets", "faccel.runtime", "faccel.training.step"]
)


def env_of(rank, world_size, port):
    """What torchrun would set, with a store that the parent hosts."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def hosted_store():
    """A store on a port that the system chooses."""
    return dist.TCPStore(
        "127.0.0.1",
        0,
        None,
        is_master=True,
        timeout=timedelta(seconds=60),
        wait_for_workers=False,
        multi_tenant=True,
    )


def _child(fn, rank, world_size, port, pipe, args, options):
    torch.set_num_threads(1)
    multiprocessing.set_start_method(
        "fork", force=True
    )  # of a loader's workers: the system's default, not the server's
    try:
        with faccel.init(env=env_of(rank, world_size, port), **options) as ctx:
            out = (True, fn(ctx, *args))
    except BaseException as error:
        traceback.print_exc(file=sys.stderr)
        out = (False, error)
    pipe.send_bytes(pickle.dumps(out))
    pipe.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def outcomes(fn, world_size, *args, **options):
    """Run a module's `fn(ctx, *args)` in processes; return for each rank `(is_fine, result or error)`."""
    store = hosted_store()
    children = []
    for rank in range(world_size):
        receive, send = SERVER.Pipe(duplex=False)
        process = SERVER.Process(
            target=_child, args=(fn, rank, world_size, store.port, send, args, options)
        )
        process.start()
        send.close()
        children.append((process, receive))
    results = []
    for process, receive in children:
        if not receive.poll(120):
            for other, _ in children:
                other.kill()
            raise TimeoutError("a rank has not answered in 120 s")
        try:
            results.append(pickle.loads(receive.recv_bytes()))
        except EOFError as error:  # it was killed, or aborted
            results.append((False, error))
        process.join()
    return results


def run_ranks(fn, world_size, *args, **options):
    """Run a module's `fn(ctx, *args)` in processes; return the results by rank, raise the first rank's error."""
    results = outcomes(fn, world_size, *args, **options)
    for fine, value in results:
        if not fine:
            raise value
    return [value for _, value in results]
