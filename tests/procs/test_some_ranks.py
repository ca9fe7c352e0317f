"""A call of all ranks that only some make raises within seconds on all, without debug mode."""

import contextlib
import itertools
import os
import re
import tempfile
import threading
import time

import pytest
import torch
import torch.distributed as dist

import faccel
from faccel.errors import DesyncError, RankFailedError
from tests.ranks import outcomes, run_ranks

# Longer than the test may take: an error by timeout fails it.
TIMEOUT_S = 600
LIMIT_S = 120
SLOW_S = 0.2


def folder_of(ctx):
    return os.path.join(tempfile.gettempdir(), f"faccel-some-ranks-{ctx.topology.main_port}")


def train(model, opt, ctx):
    scaler = faccel.init_scaler(ctx)
    for _ in range(2):
        scaler = faccel.scaled_backward(model(torch.ones(2, 2)).sum(), scaler, ctx)
        _, scaler = faccel.optimizer_step(opt, scaler, ctx)


def another_call(model, opt, ctx):
    faccel.checkpoint.save_object(0, f"{folder_of(ctx)}.pickle", ctx)


def wait_until_rank_0_waits(ctx):
    deadline = time.monotonic() + LIMIT_S
    while ctx.comm.rank_status.read_position(0) is None and time.monotonic() < deadline:
        pass


def close(model, opt, ctx):
    wait_until_rank_0_waits(ctx)
    faccel.shutdown(ctx)


OTHERS = {"train": train, "another call": another_call, "close": close}
CALLS = {
    "save": lambda model, opt, ctx: faccel.save({}, folder_of(ctx), ctx, step=1),
    "load": lambda model, opt, ctx: faccel.load({}, folder_of(ctx), ctx),
    "latest": lambda model, opt, ctx: faccel.latest(folder_of(ctx), ctx),
    "export_model": lambda model, opt, ctx: faccel.checkpoint.export_model(
        model, folder_of(ctx), ctx
    ),
    "load_model": lambda model, opt, ctx: faccel.checkpoint.load_model(model, folder_of(ctx), ctx),
    "wrap": lambda model, opt, ctx: faccel.wrap(torch.nn.Linear(2, 2), ctx),
    "rewrap": lambda model, opt, ctx: faccel.rewrap(model, ctx),
    "barrier": lambda model, opt, ctx: faccel.barrier(ctx),
    "full_state_dict": lambda model, opt, ctx: faccel.parallel.full_state_dict(model, ctx),
    "gathered": lambda model, opt, ctx: faccel.parallel.gathered(model, ctx),
    "join": lambda model, opt, ctx: faccel.parallel.join(model, opt, ctx),
    "gather": lambda model, opt, ctx: faccel.gather(torch.ones(3), ctx),
    "reduce": lambda model, opt, ctx: faccel.reduce(torch.ones(300), ctx),
    "broadcast": lambda model, opt, ctx: faccel.broadcast(torch.ones(300), ctx, src=1),
    "all_gather": lambda model, opt, ctx: faccel.gather_objects("x", ctx),
    "all_reduce": lambda model, opt, ctx: faccel.agree(ctx, stop=True),
}
FAST = ("save", "reduce")


def model_and_optimizer(ctx):
    model = faccel.wrap(torch.nn.Linear(2, 1), ctx)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    ctx.comm.call_order.slow_s = SLOW_S
    return model, faccel.wrap_optimizer(opt, model, ctx)


def on_some_ranks(ctx, call, other):
    model, opt = model_and_optimizer(ctx)
    if ctx.is_main:
        CALLS[call](model, opt, ctx)
    else:
        OTHERS[other](model, opt, ctx)


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize(
    "call",
    [
        *FAST,
        *(pytest.param(call, marks=pytest.mark.slow) for call in CALLS if call not in FAST),
    ],
)
def test_all_ranks_raise_and_name_both_lines(call, other):
    start_s = time.monotonic()
    errors = [error for _, error in outcomes(on_some_ranks, 2, call, other, timeout_s=TIMEOUT_S)]
    assert time.monotonic() - start_s < LIMIT_S
    for error in errors:
        # The rank that calls before the other one leaves finds a rank that has left.
        assert isinstance(error, (DesyncError, RankFailedError)), repr(error)
        assert re.search(r"rank 0: .*at tests/procs/test_some_ranks\.py:\d+", error.got), error.got
        assert re.search(r"rank 1: .*at tests/procs/test_some_ranks\.py:\d+", error.got), error.got
    if other != "close":
        assert isinstance(errors[0], DesyncError)
        assert errors[0].got == errors[1].got
        assert errors[0].got.startswith(f"rank 0: {call}")
        assert "on every rank; look for an `if ctx.is_main` around tests/procs/" in errors[0].fix


# The last two ranks of three are late, each in another way. Rank 0 waits for them.
LATE_S = 0.4


def computes(ctx, group, path):
    end_s = time.monotonic() + LATE_S
    x = torch.ones(400, 400, requires_grad=True)
    while time.monotonic() < end_s:
        (x @ x).sum().backward()


def sleeps(ctx, group, path):
    time.sleep(LATE_S)


def reads_slowly_in_torch(ctx, group, path):
    """Open a pipe, which blocks in a frame of torch until another thread writes."""
    with contextlib.suppress(FileExistsError):
        os.mkfifo(path)
    writer = threading.Timer(LATE_S, lambda: torch.save(0, path))
    writer.start()
    with contextlib.suppress(OSError):  # a pipe cannot seek
        torch.load(path)
    writer.join()


def waits_for_a_message(ctx, group, path):
    x = torch.ones(1)
    if ctx.rank == 1:
        time.sleep(LATE_S)
        dist.send(x, 2)
    else:
        dist.recv(x, 1)


def waits_in_a_group_without_rank_0(ctx, group, path):
    if ctx.rank == 1:
        time.sleep(LATE_S)
    dist.all_reduce(torch.ones(1), group=group)


LATE = [
    computes,
    sleeps,
    reads_slowly_in_torch,
    waits_in_a_group_without_rank_0,
    waits_for_a_message,  # the ranks have different numbers of messages afterwards
    sleeps,
]


def save_object(ctx, folder):
    faccel.checkpoint.save_object(0, os.path.join(folder, "object"), ctx)


def gather(ctx, folder):
    faccel.gather(torch.ones(1), ctx)


def late_for_each_call(ctx, folder):
    model, opt = model_and_optimizer(ctx)
    ctx.comm.call_order.slow_s = LATE_S / 20
    group = dist.new_group([1, 2])
    waits_s = []
    for late, call in itertools.product(LATE, (gather, save_object)):
        train(model, opt, ctx)
        if ctx.rank:
            late(ctx, group, os.path.join(folder, f"pipe{ctx.rank}"))
        start_s = time.monotonic()
        call(ctx, folder)
        waits_s.append(time.monotonic() - start_s)
    return min(waits_s)


@pytest.mark.slow
def test_a_rank_that_is_late_does_not_raise(tmp_path):
    shortest_s = run_ranks(late_for_each_call, 3, str(tmp_path), timeout_s=TIMEOUT_S)[0]
    assert shortest_s > LATE_S / 2  # rank 0 has waited each time


class CountingStore(dist.Store):
    """Counts the requests of the main thread to a store."""

    def __init__(self, store):
        super().__init__()
        self.store = store
        self.num_requests = 0

    def __getattribute__(self, name):
        if name in ("store", "num_requests"):
            return super().__getattribute__(name)
        if threading.current_thread() is threading.main_thread():
            self.num_requests += 1
        return getattr(self.store, name)


def requests_of_steps(ctx):
    model, opt = model_and_optimizer(ctx)
    store = ctx.comm.rank_status.store = CountingStore(ctx.comm.rank_status.store)
    for _ in range(50):
        train(model, opt, ctx)
    of_steps = store.num_requests
    faccel.barrier(ctx)
    ctx.comm.rank_status.store = store.store
    return of_steps, store.num_requests - of_steps


def test_a_training_step_sends_nothing_to_the_store_and_a_call_a_few_requests():
    for of_steps, of_call in run_ranks(requests_of_steps, 2, timeout_s=TIMEOUT_S):
        assert of_steps == 0
        assert 1 <= of_call <= 5
