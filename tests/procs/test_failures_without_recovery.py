"""Ranks that cannot leave their collectives: a failure of one ends all, long before a timeout."""

import pickle
import sys
import time

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

import faccel
from faccel.errors import ConfigError, RankFailedError
from tests.ranks import SERVER, env_of, hosted_store

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
TIMEOUT_S = 200
CASES = {
    "debug mode, ddp": ("dp_replicate=2", {"debug": True}),
    "debug mode, fsdp": ("dp_shard=2", {"debug": True}),
    "process group of the user, ddp": ("dp_replicate=2", {"adopted": True}),
    "process group of the user, fsdp": ("dp_shard=2", {"adopted": True}),
}


def train(ctx, policy, point):
    """Train two windows; rank 1 fails in the second one."""
    model = faccel.wrap(torch.nn.Linear(4, 1), ctx)
    calls = []

    def fail(grad=None):
        if ctx.rank == 1 and len(calls) == 6:
            raise KeyError("label")

    def loss_fn(model, batch):
        calls.append(1)
        if point == "forward":
            fail()
        loss = model(batch.data).mean()
        if point == "backward":
            loss.register_hook(fail)
        return loss

    opt = faccel.wrap_optimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, ctx)
    scaler = faccel.init_scaler(ctx)
    for window in faccel.windows(faccel.shard(DataLoader(torch.ones(16, 4), 1), ctx), ctx, size=4):
        _, scaler = faccel.forward_backward(loss_fn, model, window, scaler, ctx, **policy)
        _, scaler = faccel.optimizer_step(opt, scaler, ctx)


def run_rank(rank, port, pipe, case, policy, point):
    """Run `train` as a script: an exception ends the process."""
    mesh, options = CASES[case]
    if options.get("adopted"):
        store = dist.TCPStore("127.0.0.1", port, None, is_master=False)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
        options = {}
    error = None
    try:
        with faccel.init(
            env=env_of(rank, 2, port), mesh=mesh, timeout_s=TIMEOUT_S, **options
        ) as ctx:
            train(ctx, policy, point)
    except Exception as caught:
        error = caught
    # As a script ends. The test serves the store.
    pipe.send_bytes(pickle.dumps((error, time.monotonic())))
    sys.exit(0)


def outcomes(case, policy, point):
    store = hosted_store()
    pipes = [SERVER.Pipe(duplex=False) for _ in range(2)]
    processes = [
        SERVER.Process(
            target=run_rank, args=(rank, store.port, pipes[rank][1], case, policy, point)
        )
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    results = []
    for (receiver, _), process in zip(pipes, processes, strict=True):
        if not receiver.poll(2 * TIMEOUT_S):
            process.kill()
            raise TimeoutError("a rank hangs")
        results.append(pickle.loads(receiver.recv_bytes()))
        process.join()
    return results


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("point", ["forward", "backward"])
def test_all_ranks_raise_long_before_the_timeout(case, point):
    (other, other_s), (own, own_s) = outcomes(case, {}, point)
    assert isinstance(own, KeyError)
    assert isinstance(other, RankFailedError) and "rank 1" in str(other)
    assert "KeyError" in str(other), other
    assert abs(other_s - own_s) < TIMEOUT_S / 10


@pytest.mark.parametrize("case", ["debug mode, ddp", "process group of the user, ddp"])
def test_a_policy_raises_at_the_first_call(case):
    for error, _ in outcomes(case, {"skip": (KeyError,)}, "forward"):
        assert isinstance(error, ConfigError) and "leave their collectives" in error.problem
