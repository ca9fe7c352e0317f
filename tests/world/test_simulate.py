"""Simulated worlds: results, traces, desyncs, generators, groups, messages and limits."""

import math
import random
import signal
import sys
import threading
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

import faccel
from faccel.errors import ConfigError, DesyncError, FaccelError, WorldError
from faccel.testing import fake_context, simulate


def test_results_are_in_rank_order_and_the_trace_lists_each_call():
    out = simulate(lambda ctx: faccel.reduce(torch.tensor(float(ctx.rank)), ctx, op="mean"), 8)
    assert [x.item() for x in out] == [3.5] * 8
    assert [(e.rank, e.op, e.axis, e.num_bytes) for e in out.trace] == [
        (r, "all_reduce", "data", 4) for r in range(8)
    ]
    assert all("test_simulate.py" in e.site for e in out.trace)


def test_the_cost_of_a_world_is_proportional_to_its_size():
    def fn(ctx):
        for _ in range(10):
            faccel.reduce(torch.ones(4), ctx)

    def cpu_seconds(world_size):
        start = time.process_time()  # not wall time, which depends on the load
        simulate(fn, world_size)
        return time.process_time() - start

    cpu_seconds(2)
    small = min(cpu_seconds(8) for _ in range(3))
    assert cpu_seconds(64) < 4 * 8 * small


def test_a_collective_on_the_main_rank_only_names_its_line():
    def fn(ctx):
        if ctx.is_main:
            faccel.barrier(ctx)  # the line

    with pytest.raises(DesyncError) as error:
        simulate(fn, 3, timeout_s=math.inf)  # found without a limit
    line = fn.__code__.co_firstlineno + 2
    assert (
        f"rank 0: barrier at tests/world/test_simulate.py:{line}, ranks 1 to 2: returned"
        in error.value.got
    )


def test_a_rank_that_returns_early_names_where_the_others_wait():
    def fn(ctx):
        for step in range(5):
            if ctx.rank == 2 and step == 3:
                return
            faccel.gather(torch.ones(1), ctx)

    message = r"ranks 0, 1, 3: all_gather\(.*\) at .*simulate.py:\d+, rank 2: returned"
    with pytest.raises(DesyncError, match=message):
        simulate(fn, 4, timeout_s=math.inf)  # found without a limit


@pytest.mark.parametrize(
    "other",
    [
        lambda ctx: faccel.broadcast(torch.ones(2), ctx),
        lambda ctx: faccel.reduce(torch.ones(3), ctx),
        lambda ctx: faccel.reduce(torch.ones(2, dtype=torch.float64), ctx),
        lambda ctx: faccel.reduce(torch.ones(2), ctx, op="max"),
    ],
    ids=["operation", "shape", "dtype", "reduction"],
)
def test_an_error_names_both_calls_of_ranks_that_disagree(other):
    def fn(ctx):
        return faccel.reduce(torch.ones(2), ctx) if ctx.rank == 0 else other(ctx)

    with pytest.raises(
        DesyncError, match=r"rank 0: all_reduce\(sum, float32\[2\]\) at .*, rank 1: "
    ):
        simulate(fn, 2)


@pytest.mark.parametrize("counts", [(2, 3), (3, 2), (1, 2), (2, 1), (5, 1)], ids=str)
@pytest.mark.parametrize("is_public", [True, False])
def test_an_exchange_of_rows_of_other_sizes_is_an_error_on_every_rank(counts, is_public):
    raised = []

    def fn(ctx):
        rows = torch.ones(2, counts[ctx.rank])
        try:
            if is_public:
                faccel.comm.all_to_all(rows, ctx)
            else:
                dist.all_to_all_single(torch.empty_like(rows), rows)
            faccel.barrier(ctx)
        except DesyncError:
            raised.append(ctx.rank)
            raise

    with pytest.raises(DesyncError) as error:
        simulate(fn, 2)
    assert sorted(raised) == [0, 1]
    if not is_public:  # whose rows are bytes
        assert all(f"{count}]" in error.value.got for count in counts), error.value.got


def test_the_error_of_the_first_failing_rank_is_raised_with_a_note():
    def fn(ctx):
        if ctx.rank == 1:
            raise KeyError("missing")
        faccel.barrier(ctx)

    with pytest.raises(KeyError, match="missing") as caught:
        simulate(fn, 3)
    assert caught.value.__notes__ == ["raised on rank 1 of 3 of a simulation"]


def test_a_desync_is_raised_on_every_rank():
    ranks = []

    def fn(ctx):
        try:
            if ctx.rank:
                faccel.barrier(ctx)
        except DesyncError:
            ranks.append(ctx.rank)
            raise

    with pytest.raises(DesyncError):
        simulate(fn, 4)
    assert sorted(ranks) == [1, 2, 3]


def test_a_rank_without_progress_raises_and_shows_its_line():
    stop = []

    def fn(ctx):
        while not stop:
            time.sleep(0.01)

    with pytest.raises(TimeoutError, match=r"time\.sleep"):
        simulate(fn, 2, timeout_s=0.2)
    stop.append(True)


@pytest.mark.slow
def test_a_slow_rank_that_makes_progress_has_no_limit():
    def fn(ctx):
        for _ in range(3):
            time.sleep(0.5)  # each step is below the limit, the sum is above it
            faccel.barrier(ctx)
        return True

    assert simulate(fn, 2, timeout_s=2) == (True, True)


def weights():
    torch.manual_seed(0)
    return nn.Linear(5, 5).weight.detach()


def test_each_rank_has_separate_generators():
    def fn(ctx):
        draws = []
        torch.manual_seed(0)
        random.seed(1)
        np.random.seed(2)
        faccel.barrier(ctx)
        first = nn.Linear(5, 5)
        faccel.barrier(ctx)
        for _ in range(3):
            draws.append((torch.rand(()).item(), random.random(), np.random.rand()))
            faccel.barrier(ctx)
        return first.weight.detach(), draws

    out = simulate(fn, 4)
    assert all(torch.equal(w, weights()) for w, _ in out)
    assert all(draws == out[0][1] for _, draws in out)


def test_unseeded_ranks_differ_and_runs_are_deterministic():
    def fn(ctx):
        return torch.rand(()).item(), random.random(), np.random.rand()

    out = simulate(fn, 4)
    assert len(set(out)) == 4
    assert simulate(fn, 4) == out
    assert simulate(fn, 4, seed=1) != out


def test_the_state_of_the_process_is_restored():
    torch.manual_seed(3)
    expected = (torch.rand(2).tolist(), torch.rand(2).tolist())
    torch.manual_seed(3)
    hook = sys.excepthook
    first = torch.rand(2).tolist()
    simulate(lambda ctx: torch.manual_seed(99), 3)
    assert (first, torch.rand(2).tolist()) == expected
    assert sys.excepthook is hook
    assert not dist.is_initialized()


def test_torch_distributed_returns_the_simulated_rank():
    def fn(ctx):
        x = torch.tensor([ctx.rank])
        dist.all_reduce(x)
        out = [None] * ctx.world_size
        dist.all_gather_object(out, {"r": ctx.rank})
        return dist.get_rank(), dist.get_world_size(), x.item(), [o["r"] for o in out]

    assert simulate(fn, 3) == tuple((r, 3, 3, [0, 1, 2]) for r in range(3))


def test_every_supported_operation_of_c10d():
    def fn(ctx):
        w, r = ctx.world_size, ctx.rank
        x = torch.arange(2.0) + 10 * r
        reduced = x.clone()
        dist.reduce(reduced, dst=1)
        gathered = [torch.zeros(2) for _ in range(w)]
        dist.gather(x, gathered if r == 0 else None, dst=0)
        scattered = torch.zeros(2)
        dist.scatter(
            scattered, [torch.full((2,), float(i)) for i in range(w)] if r == 2 else None, src=2
        )
        shard = torch.zeros(1)
        dist.reduce_scatter(shard, [torch.tensor([float(i + r)]) for i in range(w)])
        swapped = torch.zeros(w)
        dist.all_to_all_single(swapped, torch.arange(float(w)) + 10 * r)
        return (
            reduced.tolist(),
            [g.tolist() for g in gathered],
            scattered.tolist(),
            shard.item(),
            swapped.tolist(),
        )

    out = simulate(fn, 3)
    assert out[1][0] == [30.0, 33.0]
    assert out[0][1] == [[0.0, 1.0], [10.0, 11.0], [20.0, 21.0]]
    assert [o[2] for o in out] == [[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]]
    assert [o[3] for o in out] == [3.0, 6.0, 9.0]
    assert [o[4] for o in out] == [[r, 10.0 + r, 20.0 + r] for r in range(3)]


def test_sending_does_not_wait_and_receiving_does():
    def fn(ctx):
        right, left = (ctx.rank + 1) % 3, (ctx.rank - 1) % 3
        got = torch.zeros(1)
        receive = dist.irecv(got, left)
        dist.send(torch.tensor([float(ctx.rank)]), right)
        receive.wait()
        return got.item()

    assert simulate(fn, 3) == (2.0, 0.0, 1.0)


def test_receives_get_messages_in_the_order_of_their_calls_whichever_is_waited_for_first():
    def fn(ctx):
        if ctx.rank == 0:
            for value in range(3):
                dist.send(torch.tensor([float(value)]), 1)
            return []
        got = [torch.zeros(1) for _ in range(2)]
        first, second = (dist.irecv(tensor, 0) for tensor in got)
        second.wait()
        got.append(torch.zeros(1))
        dist.recv(got[-1])  # from any rank: the first message that no other call waits for
        first.wait()
        return torch.cat(got).tolist()

    assert simulate(fn, 2)[1] == [0.0, 1.0, 2.0]


def test_a_message_that_never_comes_is_a_desync():
    def fn(ctx):
        if ctx.rank == 0:
            dist.recv(torch.zeros(1), 1)

    with pytest.raises(DesyncError, match="recv from 1"):
        simulate(fn, 2)


def test_sub_groups_and_device_meshes_work():
    from torch.distributed.device_mesh import init_device_mesh

    def fn(ctx):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
        x = torch.tensor([float(ctx.rank)])
        dist.all_reduce(x, group=mesh.get_group("b"))
        evens = dist.new_group([0, 2])
        y = torch.tensor([float(ctx.rank)])
        if ctx.rank % 2 == 0:
            dist.all_reduce(y, group=evens)
        return x.item(), y.item()

    assert simulate(fn, 4) == ((1.0, 2.0), (1.0, 1.0), (5.0, 2.0), (5.0, 3.0))


def test_the_mesh_of_a_context_is_a_device_mesh():
    def fn(ctx):
        mesh = ctx.mesh.device_mesh
        assert ctx.mesh.device_mesh is mesh
        return mesh.mesh_dim_names, mesh.get_local_rank("dp_replicate")

    assert simulate(fn, 3) == tuple((("dp_replicate",), r) for r in range(3))


def test_dtensors_work_on_the_device_mesh():
    from torch.distributed.tensor import Shard, distribute_tensor

    def fn(ctx):
        x = distribute_tensor(torch.arange(8.0), ctx.mesh.device_mesh, [Shard(0)])
        return x.to_local().tolist(), (x * 2).sum().full_tensor().item()

    assert simulate(fn, 4) == tuple(([2.0 * r, 2.0 * r + 1], 56.0) for r in range(4))


def test_a_collective_after_the_simulation_is_an_error():
    ctx = simulate(lambda ctx: ctx, 2)[0]
    with pytest.raises(WorldError, match="has ended"):
        faccel.reduce(torch.ones(1), ctx)


def test_an_error_names_every_rank():
    def fn(ctx):
        if ctx.rank == 2:
            faccel.reduce(torch.ones(3), ctx)
        elif ctx.rank < 3:
            faccel.reduce(torch.ones(2), ctx)

    with pytest.raises(DesyncError) as error:
        simulate(fn, 4)
    assert all(
        word in error.value.got
        for word in ("ranks 0 to 1: all_reduce(sum, float32[2])", "float32[3]", "rank 3")
    )


def test_an_incomplete_message_or_collective_is_a_desync():
    def unread(ctx):
        if ctx.rank == 0:
            dist.send(torch.ones(1), 1)

    def unjoined(ctx):
        if ctx.rank == 0:
            dist.all_reduce(torch.ones(1), async_op=True)

    with pytest.raises(DesyncError, match="rank 0 to rank 1"):
        simulate(unread, 2)
    with pytest.raises(DesyncError, match="rank 0: all_reduce"):
        simulate(unjoined, 2)


def test_a_message_that_does_not_fit_is_a_desync():
    def fn(ctx):
        if ctx.rank == 0:
            dist.send(torch.ones(1, dtype=torch.int64), 1)
        else:
            dist.recv(torch.zeros(4), 0)

    with pytest.raises(DesyncError, match=r"int64\[1\] from rank 0, float32\[4\]"):
        simulate(fn, 2)


def test_is_completed_lets_other_ranks_run():
    def fn(ctx):
        x = torch.ones(1)
        work = dist.all_reduce(x, async_op=True)
        assert work.is_completed()
        return x.item()

    assert simulate(fn, 2) == (2.0, 2.0)


def test_ctrl_c_ends_the_simulation_and_restores_the_state_of_the_process():
    calls = []

    def fn(ctx):
        if ctx.rank == 0:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        while len(calls) < 10**6:
            calls.append(ctx.rank)
            torch.manual_seed(1)
            faccel.barrier(ctx)

    table = dist.distributed_c10d._world
    with pytest.raises(KeyboardInterrupt):
        simulate(fn, 2)
    assert dist.distributed_c10d._world is table
    time.sleep(0.2)  # a rank that still ran has stopped at its next collective
    num_calls, state = len(calls), torch.get_rng_state()
    time.sleep(0.1)
    assert len(calls) == num_calls
    assert torch.equal(torch.get_rng_state(), state)
    assert dist.distributed_c10d._world is table


def test_waiting_for_a_store_key_that_is_never_set_is_a_desync():
    def fn(ctx):
        if ctx.rank == 0:
            dist.distributed_c10d._get_default_store().get("never")

    with pytest.raises(DesyncError, match="waiting for a key of the store"):
        simulate(fn, 2)


def test_simulations_may_be_nested():
    def outer(ctx):
        inner = simulate(lambda c: faccel.reduce(torch.tensor(1), c).item(), ctx.rank + 2)
        return inner[0], faccel.reduce(torch.tensor(1), ctx).item()

    assert simulate(outer, 3) == ((2, 3), (3, 3), (4, 3))


def test_a_world_may_have_one_rank():
    assert simulate(
        lambda ctx: (ctx.world_size, faccel.gather(torch.tensor([4]), ctx).item()), 1
    ) == ((1, 4),)
    with pytest.raises(ConfigError):
        simulate(lambda ctx: None, 0)


def test_a_fake_context_has_no_peers():
    ctx = fake_context(3, 8)
    assert (ctx.rank, ctx.data_rank, ctx.world_size, ctx.is_main, ctx.local_rank) == (
        3,
        3,
        8,
        False,
        3,
    )
    with pytest.raises(WorldError, match="simulate"):
        faccel.reduce(torch.ones(1), ctx)
    assert faccel.reduce(torch.ones(1), fake_context(0, 1)).item() == 1
    with pytest.raises(FaccelError):
        fake_context(0, 4, mesh="dp_replicate=3")


@pytest.mark.world_size(1, 2, 4)
def test_the_plugin_runs_a_test_on_every_rank(ctx, tmp_path):
    (tmp_path / str(ctx.rank)).touch()
    faccel.barrier(ctx)
    assert len(list(tmp_path.iterdir())) == ctx.world_size


def test_a_group_of_another_rank_is_refused_where_it_would_hang():
    shared = []

    def fn(ctx):
        shared.append(dist.group.WORLD)
        dist.all_reduce(torch.ones(1), group=shared[0])

    # c10d's decorator replaces our error while it describes the group, which rank 1 does not have
    with pytest.raises((DesyncError, ValueError)) as error:
        simulate(fn, 2)
    assert "that of rank 0 on rank 1: all_reduce at" in str(error.value.__context__)


def test_a_function_may_import_torch_distributed_nn():
    def fn(ctx):
        from torch.distributed.nn import functional

        return functional._AllReduce.apply(dist.ReduceOp.SUM, dist.group.WORLD, torch.ones(1))

    def default_group(ctx):
        from torch.distributed.nn.functional import all_reduce

        return all_reduce.__defaults__[-1]

    assert simulate(fn, 2) == (torch.tensor([2.0]),) * 2
    assert simulate(default_group, 2) == (None, None)


def test_a_failed_simulation_logs_nothing_of_c10d(log_records):
    with pytest.raises(DesyncError):
        simulate(lambda ctx: ctx.is_main and faccel.barrier(ctx), 2)
    assert log_records("torch") == []
