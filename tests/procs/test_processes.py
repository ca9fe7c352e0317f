"""Behaviour that simulated worlds cannot show: gloo, real timeouts, aborted processes."""

import contextlib
import functools
import os
import re
import subprocess
import sys
import threading
import time
import weakref

import pytest
import torch
import torch.distributed as dist

import faccel
from faccel.errors import DesyncError, DeviceError, RankFailedError, WorldError
from faccel.torch_names import flight_record
from tests.ranks import SERVER, TIMEOUT_S, env_of, hosted_store, outcomes, run_ranks


def world(ctx):
    return ctx.rank, ctx.world_size, ctx.local_rank, ctx.device.type, ctx.topology.source


def test_ranks_of_a_node_without_gpus_compute_on_the_cpu():
    assert run_ranks(world, 2) == [(0, 2, 0, "cpu", "torchrun"), (1, 2, 1, "cpu", "torchrun")]


def several_contexts(ctx):
    second = faccel.init(env=dict(os.environ) | env_of(ctx.rank, ctx.world_size, 1), seed=9)
    single = faccel.init(env={})
    out = (
        second.comm.group("world") is ctx.comm.group("world"),
        faccel.reduce(torch.tensor(1), second).item(),
        faccel.reduce(torch.tensor(1), single).item(),
        (ctx.config.seed, second.config.seed),
    )
    faccel.shutdown(second)
    still_works = faccel.reduce(torch.tensor(1), ctx).item()
    faccel.shutdown(single)
    return (*out, still_works, dist.is_initialized())


def test_contexts_share_the_group_until_the_last_one_is_shut_down():
    assert run_ranks(several_contexts, 2) == [(True, 2, 1, (0, 9), 2, True)] * 2


def another_world(ctx):
    try:
        faccel.init(env=env_of(0, 5, 1))
    except WorldError as error:
        return error.got
    return "no error"


def test_a_second_world_in_a_process_is_an_error():
    assert run_ranks(another_world, 2)[1] == "rank 1 of 2 before, rank 0 of 5 now"


def hooks(ctx):
    replaced = sys.excepthook is not sys.__excepthook__
    faccel.shutdown(ctx)
    return replaced, sys.excepthook is sys.__excepthook__, dist.is_initialized()


def test_shutdown_destroys_the_group_and_restores_the_excepthook():
    assert run_ranks(hooks, 2) == [(True, True, False)] * 2


def release_tensors(ctx):
    for _ in range(50):
        faccel.gather(torch.ones(3), ctx)
        faccel.reduce(torch.ones(3), ctx)
        faccel.broadcast(torch.ones(3), ctx)
        assert len(ctx.comm.in_flight.tensors) < 10  # released tensors are removed
    tensor = torch.ones(3)
    # Autograd keeps a C++ reference, as a thread of gloo does.
    product = [torch.ones(3, requires_grad=True) * tensor]
    ctx.comm.in_flight.add(tensor)
    threading.Timer(0.2, product.clear).start()
    start = time.perf_counter()
    ctx.comm.in_flight.drain()
    return time.perf_counter() - start, len(product), len(ctx.comm.in_flight.tensors)


def test_shutdown_waits_until_no_thread_of_gloo_holds_a_tensor():
    for waited_s, num_references, num_in_flight in run_ranks(release_tensors, 2):
        assert waited_s > 0.1
        assert (num_references, num_in_flight) == (0, 0)


def restart_ten_times(ctx, port):
    faccel.shutdown(ctx)
    for _ in range(10):
        with faccel.init(env=env_of(ctx.rank, 2, port), timeout_s=120) as again:
            assert faccel.reduce(torch.tensor(1), again).item() == 2
    return True


def test_a_world_can_be_shut_down_and_started_again():
    store = hosted_store()
    assert run_ranks(restart_ten_times, 2, store.port) == [True, True]


def use_after_shutdown(ctx):
    faccel.shutdown(ctx)
    try:
        faccel.reduce(torch.ones(1), ctx)
    except WorldError as error:
        return error.problem


def test_a_collective_after_shutdown_is_an_error():
    assert run_ranks(use_after_shutdown, 2) == ["this context was shut down"] * 2


def reduce_on_rank_1_only(ctx):
    if ctx.rank == 0:
        return None
    faccel.reduce(torch.ones(1), ctx)


def test_a_rank_that_waits_for_one_that_left_raises_and_names_it():
    (succeeded, _), (_, error) = outcomes(reduce_on_rank_1_only, 2, timeout_s=120)
    assert succeeded
    assert isinstance(error, RankFailedError)
    assert error.problem.startswith("rank 1 could not finish all_reduce")
    left = r"rank 0: left at tests/ranks\.py:\d+, rank 1: all_reduce over `data` at"
    assert re.search(left, error.got), error.got


def one_fails(ctx, where):
    model = faccel.wrap(torch.nn.BatchNorm1d(2), ctx)
    scaler = faccel.init_scaler(ctx)
    if ctx.rank == 1:
        raise ValueError("bad sample")
    loss = model(torch.randn(4, 2)).sum()
    if where == "backward":
        faccel.scaled_backward(loss, scaler, ctx)


def test_the_error_of_a_waiting_rank_contains_what_the_other_rank_raised():
    (_, first), (_, second) = outcomes(one_fails, 2, "backward", timeout_s=120)
    assert isinstance(second, ValueError)
    assert isinstance(first, RankFailedError)
    assert "rank 1: raised ValueError: bad sample" in first.got
    assert "test_processes.py" in first.got


def different_collectives(ctx):
    if ctx.rank == 0:
        faccel.reduce(torch.ones(4), ctx)
    else:
        faccel.gather(torch.ones(4), ctx)


@pytest.mark.slow
def test_without_debug_mode_different_collectives_raise_before_the_timeout_and_name_the_ranks():
    # Longer than the limit of the test, so that waiting for it would fail.
    errors = [error for _, error in outcomes(different_collectives, 2, timeout_s=2 * TIMEOUT_S)]
    assert all(isinstance(error, DesyncError) for error in errors), errors
    for error in errors:
        first = "rank 0: reduce(sum) of x: float32[4] over `data` at tests/procs/test_processes.py:"
        assert first in error.got
        second = "rank 1: gather of x: float32[4] over `data` at tests/procs/test_processes.py:"
        assert second in error.got


def different_sizes(ctx, num_elements=400, call="reduce"):
    getattr(faccel, call)(torch.ones(4000 if ctx.rank else num_elements), ctx)


@pytest.mark.slow
@pytest.mark.parametrize("call", ["reduce", "gather"])
def test_few_elements_on_one_rank_and_many_on_another_raise_and_name_both(call):
    for _, error in outcomes(different_sizes, 2, 4, call, timeout_s=2 * TIMEOUT_S):
        assert isinstance(error, DesyncError), error
        first = rf"rank 0: {call}\S* at tests/procs/test_processes.py:"
        assert re.search(first, error.got), error.got
        second = rf"rank 1: {call}\S* of \d+ bytes at tests/procs/test_processes.py:"
        assert re.search(second, error.got), error.got


def different_calls_after_a_graph(ctx):
    torch.compile(lambda x: faccel.reduce(2 * x, ctx), backend="eager")(torch.ones(3))
    if ctx.rank == 0:
        faccel.agree(ctx, stop=True)
    else:
        faccel.gather_objects(1, ctx)


@pytest.mark.slow
def test_a_reduction_in_a_compiled_graph_does_not_name_the_next_call():
    for _, error in outcomes(different_calls_after_a_graph, 2, timeout_s=120):
        assert isinstance(error, DesyncError), error
        assert "rank 0: all_reduce(max) of int64[3]" in error.got
        assert "rank 1: all_gather of int64[]" in error.got


def reduce_on_rank_0_and_exchange_rows(ctx, num_elements):
    if ctx.rank == 0:
        faccel.reduce(torch.ones(4), ctx)
    else:
        faccel.comm.all_to_all(torch.ones(3, num_elements), ctx, axis="data")


# gloo sends both as messages of one kind, with less and with more bytes than the other rank
# expects.
@pytest.mark.parametrize("num_elements", [1, 1000])
def test_a_reduction_and_an_exchange_of_rows_raise_on_every_rank(num_elements):
    for _, error in outcomes(reduce_on_rank_0_and_exchange_rows, 3, num_elements, timeout_s=120):
        assert isinstance(error, DesyncError), error
        assert "rank 0: reduce(sum) of x: float32[4] over `data` at tests/procs" in error.got
        second = f"ranks 1 to 2: all_to_all of x: float32[3, {num_elements}] over `data` at"
        assert second in error.got


@pytest.mark.slow
def test_without_debug_mode_the_other_ranks_name_a_rank_that_gloo_aborts():
    errors = [error for _, error in outcomes(different_sizes, 3, timeout_s=5)]
    errors_with_names = [
        error for error in errors if isinstance(error, (RankFailedError, DesyncError))
    ]
    aborted = [rank for rank, error in enumerate(errors) if isinstance(error, EOFError)]
    assert len(errors_with_names) + len(aborted) == 3, errors
    assert aborted
    for error in errors_with_names:
        if isinstance(error, RankFailedError):
            # On a loaded node other ranks may be missing too.
            assert set(aborted) <= missing_ranks(error.got), error.got


def missing_ranks(got):
    match = re.search(r"ranks? ([0-9to, ]+): no status", got)
    if match is None:
        return set()
    first, to, last = match[1].partition(" to ")
    if to:
        return set(range(int(first), int(last) + 1))
    return {int(rank) for rank in first.split(",") if rank.strip()}


ONES = {shape: torch.ones(shape) for shape in ((2,), (2, 3), (3, 2))}
SAME_SIZE = {
    "keys": lambda ctx: faccel.reduce({"ab"[ctx.rank]: ONES[2,]}, ctx),
    "shape": lambda ctx: faccel.reduce(ONES[2, 3] if ctx.rank else ONES[3, 2], ctx),
    "op": lambda ctx: faccel.reduce(ONES[2,], ctx, op="max" if ctx.rank else "sum"),
    "dtype": lambda ctx: faccel.reduce(ONES[2,].int() if ctx.rank else ONES[2,], ctx),
}


def same_size(ctx, what):
    # The user's default device, which tensors of faccel do not use.
    with torch.device("meta"):
        SAME_SIZE[what](ctx)


@pytest.mark.parametrize("what", SAME_SIZE)
def test_reductions_of_equal_size_but_different_meaning_are_an_error_on_every_rank(what):
    for succeeded, error in outcomes(same_size, 2, what, timeout_s=120):
        assert not succeeded
        assert isinstance(error, DesyncError), error
        # Each rank names the calls of both.
        assert re.search(r"rank 0: .* at tests.*, rank 1: .* at tests", error.got), error.got


def several_debug_contexts(ctx):
    """Nested and consecutive contexts of one world; rank 1 is late."""
    topology = ctx.topology
    options = {"debug": True, "env": env_of(topology.rank, topology.world_size, topology.main_port)}
    inner = faccel.init(**options)
    faccel.barrier(ctx)
    if ctx.rank:
        time.sleep(1.5)
    faccel.reduce(torch.ones(1), inner)
    faccel.shutdown(inner)
    with contextlib.suppress(ValueError), faccel.init(**options):
        raise ValueError("tried")
    if ctx.rank:
        time.sleep(1.5)
    faccel.barrier(ctx)
    return True


@pytest.mark.slow
def test_debug_mode_distinguishes_the_contexts_of_a_world():
    assert run_ranks(several_debug_contexts, 2, debug=True, timeout_s=120) == [True, True]


def test_debug_mode_raises_on_both_ranks_before_data_is_sent():
    errors = [error for _, error in outcomes(different_sizes, 2, debug=True)]
    assert all(isinstance(error, DesyncError) for error in errors), errors
    assert {error.got for error in errors} == {errors[0].got}
    assert (
        "rank 0: reduce(sum) of x: float32[400] over `data` at tests/procs/test_processes.py:"
        in errors[0].got
    )
    assert "rank 1: reduce(sum) of x: float32[4000]" in errors[0].got


def test_debug_mode_does_not_wait_for_a_rank_that_left():
    # Longer than the limit of the test, so that waiting for it would fail.
    (succeeded, _), (_, error) = outcomes(
        reduce_on_rank_1_only, 2, debug=True, timeout_s=2 * TIMEOUT_S
    )
    assert succeeded
    assert isinstance(error, DesyncError)
    assert "rank 0: left" in error.got


def keep_user_hook(ctx):
    def user_hook(*args):
        pass

    sys.excepthook = user_hook
    faccel.shutdown(ctx)
    return sys.excepthook is user_hook


def test_shutdown_keeps_an_excepthook_of_the_user():
    assert run_ranks(keep_user_hook, 2) == [True, True]


def test_a_reference_from_cpp_to_a_tensor_is_detected():
    from faccel.comm.in_flight import _is_referenced

    alias = torch.ones(3).detach()
    assert not _is_referenced(alias)
    product = torch.ones(3, requires_grad=True) * alias  # saved for backward, in C++
    assert _is_referenced(alias)
    del product
    assert not _is_referenced(alias)


def gather_and_drop(ctx):
    x = torch.ones(3)
    alive = weakref.ref(x)
    faccel.gather(x, ctx)
    del x
    return alive() is None


def test_a_gathered_tensor_is_not_kept_until_the_next_reduction():
    assert run_ranks(gather_and_drop, 2) == [True, True]


def adopt_group(rank, port, pipe):
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    with faccel.init(env=env_of(rank, 2, port)) as ctx:
        out = faccel.reduce(torch.tensor(rank + 1), ctx).item()
    pipe.send((out, dist.is_initialized()))
    dist.destroy_process_group()
    os._exit(0)


def test_a_process_group_of_the_user_is_adopted_and_not_destroyed():
    store = hosted_store()
    pipes = [SERVER.Pipe(duplex=False) for _ in range(2)]
    processes = [
        SERVER.Process(target=adopt_group, args=(r, store.port, pipes[r][1])) for r in range(2)
    ]
    for process in processes:
        process.start()
    assert [receive.recv() for receive, _ in pipes] == [(3, True)] * 2
    for process in processes:
        process.join()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this node has a GPU")
def test_more_processes_than_devices_is_an_error():
    with pytest.raises(DeviceError) as error:
        faccel.init(env=env_of(1, 2, 1), device="cuda")
    assert error.value.got == "0 devices for 2 processes"


def set_unknown_interface():
    os.environ["GLOO_SOCKET_IFNAME"] = "nope"


@pytest.mark.slow
def test_an_unknown_network_interface_is_named_with_its_variable():
    for succeeded, error in outcomes(world, 2, before=set_unknown_interface):
        assert not succeeded
        assert isinstance(error, WorldError)
        assert "nope" in error.got
        assert "GLOO_SOCKET_IFNAME" in error.fix


def number_of_records(ctx):
    for _ in range(600):
        dist.barrier()
    return len(flight_record())


def set_variables(env):
    os.environ.update(env)


# What the user has set stays, under each name that PyTorch has for it.
@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, 500),
        ({"TORCH_FR_BUFFER_SIZE": "40"}, 40),
        ({"TORCH_NCCL_TRACE_BUFFER_SIZE": "30"}, 30),
        ({"TORCH_FR_BUFFER_SIZE": "0"}, 0),
    ],
)
def test_an_observed_run_holds_500_collectives_or_as_many_as_the_user_has_set(
    env, expected, tmp_path
):
    before = functools.partial(set_variables, env)
    numbers = run_ranks(number_of_records, 2, before=before, run_dir=str(tmp_path))
    assert numbers == [expected] * 2


def test_plain_pytorch_records_collectives_without_faccel():
    program = """
import torch.distributed as dist
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
for _ in range(600):
    dist.barrier()
from faccel.torch_names import flight_record
print(len(flight_record()))
"""
    env = {name: value for name, value in os.environ.items() if "BUFFER_SIZE" not in name}
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["600"]
