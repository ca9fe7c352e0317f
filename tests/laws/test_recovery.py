"""The laws of recovery: ranks leave their collectives together and communicate again."""

import os

import pytest
import torch
import torch.distributed as dist

import faccel
from faccel.comm.rank_errors import is_consequence
from faccel.runtime.process_groups import DEFAULT_GROUP
from faccel.testing import simulate
from faccel.training.failures import FailureReport, agreeing, decide
from tests.ranks import run_ranks

WORLDS = {
    "simulated-2": lambda law: simulate(law, 2),
    "simulated-4": lambda law: simulate(law, 4, mesh="dp_replicate=2,tp=2"),
    "gloo-2": lambda law: run_ranks(law, 2, timeout_s=20),
    "gloo-4": lambda law: run_ranks(law, 4, timeout_s=20, mesh="dp_replicate=2,tp=2"),
}
LAWS = []
pytestmark = pytest.mark.filterwarnings("ignore")  # advice of torch on layouts


def law(fn):
    LAWS.append(fn)
    return fn


def fail(ctx, rank, communicate):
    """Let one rank fail while the others communicate; return the reports of all ranks.

    On the other ranks the collective must raise.
    """
    recovery = ctx.comm.recovery
    expected = KeyError if ctx.rank == rank else RuntimeError
    with agreeing(ctx), pytest.raises(expected) as caught:
        if ctx.rank == rank:
            raise KeyError("label")
        communicate()
    assert ctx.rank == rank or is_consequence(caught.value)
    recovery.interrupt()
    return recovery.exchange(f"report of {ctx.rank}")


def total(ctx, axis="world"):
    return ctx.comm.all_reduce(torch.ones(3), "sum", axis).tolist()


@law
def ranks_that_wait_raise_and_all_reports_arrive(ctx):
    rank = ctx.world_size - 1
    reports = fail(ctx, rank, lambda: total(ctx))
    assert reports == [f"report of {other}" for other in range(ctx.world_size)]
    assert ctx.comm.recovery.renew()


@law
def groups_work_again_after_each_of_many_failures(ctx):
    for number in range(5):
        fail(ctx, number % ctx.world_size, lambda: total(ctx))
        assert ctx.comm.recovery.renew()
        for axis in ("world", "data", "storage"):
            assert total(ctx, axis) == [ctx.comm.size(axis)] * 3
        plain = torch.ones(3)
        dist.all_reduce(plain)
        assert plain.tolist() == [ctx.world_size] * 3


@law
def a_rank_that_fails_at_once_does_not_disturb_ranks_that_still_connect(ctx):
    for _ in range(20):
        fail(ctx, 0, lambda: total(ctx))
        assert ctx.comm.recovery.renew()


@law
def the_groups_of_the_device_mesh_and_of_ddp_work_again(ctx):
    layers = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    plan = faccel.Plan()
    if ctx.mesh.spec.tp > 1:
        plan = faccel.Plan(tensor={"0": "colwise", "1": "rowwise"})
    model = faccel.wrap(layers, ctx, plan=plan)
    ctx.mesh.device_mesh  # noqa: B018 (creates its groups)
    fail(ctx, 0, lambda: total(ctx))
    assert ctx.comm.recovery.renew()
    for group in ctx.mesh.device_mesh.get_all_groups():
        ones = torch.ones(1)
        dist.all_reduce(ones, group=group)
        assert ones.item() == group.size()
    faccel.scaled_backward(model(torch.ones(1, 2)).sum(), faccel.init_scaler(ctx), ctx)
    assert {p.grad is not None for p in model.parameters()} == {True}


@law
def a_collective_that_one_rank_has_left_ends_on_the_others(ctx):
    for _ in range(20):
        # the rank fails at once after its collective, in which the others may still be
        assert total(ctx) == [ctx.world_size] * 3
        fail(ctx, 0, lambda: total(ctx))
        assert ctx.comm.recovery.renew()


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("world", ["simulated-2", "simulated-4"])
def test_law_in_a_simulation(law, world):
    WORLDS[world](law)


def all_laws(ctx):
    for law in LAWS:
        law(ctx)


@pytest.mark.slow
@pytest.mark.parametrize("world", ["gloo-2", "gloo-4"])
def test_laws_on_processes(world):
    WORLDS[world](all_laws)


def grow_by_idle_threads_only(ctx):
    """Each backend of gloo has two threads that wait for work; those of devices wake up often."""

    def renew():
        fail(ctx, 0, lambda: total(ctx))
        assert ctx.comm.recovery.renew()
        return len(os.listdir("/proc/self/task"))

    first = renew()
    renew()
    num_groups = len(DEFAULT_GROUP.connections.groups)
    assert num_groups > 2
    assert renew() - first == 2 * 2 * num_groups


def test_renewed_groups_share_the_thread_of_one_device():
    run_ranks(grow_by_idle_threads_only, 2, timeout_s=20)


REPORTS = {
    "no cause": (["follow", "follow"], "raise"),
    "retry": (["follow", "retry"], "retry"),
    "skip wins": (["retry", "skip"], "skip"),
    "raise wins": (["skip", "raise"], "raise"),
    "a rank is missing": (["retry", None], "raise"),
    "a rank is in another window": (["retry", "later"], "raise"),
}


@pytest.mark.parametrize("name", REPORTS)
def test_the_severest_failure_decides(name):
    actions, expected = REPORTS[name]
    reports = []
    for rank, action in enumerate(actions):
        report = None
        if action == "later":
            report = FailureReport(rank, 8, "follow")
        elif action is not None:
            report = FailureReport(rank, 7, action, "got", 4 + rank)
        reports.append(report)
    decision = decide(reports)
    assert decision.action == expected
    if expected == "retry":
        assert decision.max_rows == 5
