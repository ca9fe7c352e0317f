"""Helper: runs a function on real ranks, which are processes that communicate over gloo.

The processes are forked from a server that has imported torch but computed nothing, so that a start
takes milliseconds. A fork of the test process would inherit the state of its OpenMP pool, and hang
in its first parallel region.
"""

import faulthandler
import multiprocessing
import os
import pathlib
import pickle
import sys
import tempfile
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist

import faccel

# Only a safety net against hangs: it must not fail a test on a loaded node.
TIMEOUT_S = 300
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.preloaded"])


def env_of(rank, world_size, port):
    """Return the environment of torchrun for a rank whose store is hosted by the test."""
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
    """Serve a store on a free port; keep the returned object while the ranks run."""
    return dist.TCPStore(
        "127.0.0.1",
        0,
        None,
        is_master=True,
        timeout=timedelta(seconds=TIMEOUT_S),
        wait_for_workers=False,
        multi_tenant=True,
    )


def _run_rank(fn, rank, world_size, port, pipe, args, options, stacks, timeout_s):
    torch.set_num_threads(1)
    # In C, so that a rank that holds Python's lock is seen, too.
    faulthandler.dump_traceback_later(
        0.9 * timeout_s, file=os.open(stacks, os.O_CREAT | os.O_WRONLY)
    )
    before, env = options.pop("before", None), options.pop("env", {})
    # The workers of a loader use the default of the system, not that of the server.
    multiprocessing.set_start_method("fork", force=True)
    try:
        if before is not None:
            before()
        with faccel.init(env=env_of(rank, world_size, port) | env, **options) as ctx:
            outcome = (True, fn(ctx, *args))
    except BaseException as error:
        traceback.print_exc(file=sys.stderr)
        outcome = (False, error)
    pipe.send_bytes(pickle.dumps(outcome))
    pipe.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def outcomes(fn, world_size, *args, **options):
    """Run a module's `fn(ctx, *args)` in processes; return `(succeeded, result or error)` by rank.

    `options` are those of `faccel.init`; `before` is called first, and `env` has more variables.
    """
    with tempfile.TemporaryDirectory() as folder:
        return _outcomes(fn, world_size, args, options, pathlib.Path(folder))


def _outcomes(fn, world_size, args, options, folder):
    store = hosted_store()
    processes = []
    for rank in range(world_size):
        receiver, sender = SERVER.Pipe(duplex=False)
        stacks = str(folder / f"rank{rank}")
        arguments = (fn, rank, world_size, store.port, sender, args, options, stacks, TIMEOUT_S)
        process = SERVER.Process(target=_run_rank, args=arguments)
        process.start()
        sender.close()
        processes.append((process, receiver))
    results = []
    for process, receiver in processes:
        if not receiver.poll(TIMEOUT_S):
            for other, _ in processes:
                other.kill()
            written = [f"{path.name}: {path.read_text()}" for path in sorted(folder.iterdir())]
            raise TimeoutError(f"no rank may take {TIMEOUT_S} s\n" + "\n".join(written))
        try:
            results.append(pickle.loads(receiver.recv_bytes()))
        except EOFError as error:  # the process was killed or aborted
            results.append((False, error))
        process.join()
    return results


def run_ranks(fn, world_size, *args, **options):
    """Run a module's `fn(ctx, *args)` in processes; return the results by rank.

    Raises the error of the first rank that failed.
    """
    results = outcomes(fn, world_size, *args, **options)
    for succeeded, value in results:
        if not succeeded:
            raise value
    return [value for _, value in results]
