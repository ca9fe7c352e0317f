"""`faccel why` on real ranks, of which one has a fault."""

import ctypes
import json
import os
import signal

import pytest

import faccel
from faccel.observe.ask import ask
from faccel.observe.verdict import verdict
from tests.command_line import Command
from tests.ranks import SERVER, env_of, hosted_store
from tests.why_faults import FAULTS, MESHES, Job

pytestmark = pytest.mark.slow
MAX_TRIES = 20


def verdict_of(run_dir, *kinds):
    """Return the first verdict of one of these kinds: on a loaded node a fault takes its time."""
    for _ in range(MAX_TRIES):
        result = verdict(ask(run_dir, duration_s=0.6, interval_s=0.005))
        if result.kind in kinds:
            return result
    raise AssertionError(result)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("strategy", MESHES)
def test_the_faulty_rank_and_its_phase_are_named(tmp_path, strategy, fault):
    kind, phase, part = FAULTS[fault]
    with Job(str(tmp_path), strategy, fault) as job:
        job.wait_for_fault()
        result = verdict_of(str(tmp_path), kind)
    assert result.ranks == (1,), result
    assert part in result.sentence, result
    assert not phase or result.phase == phase, result


def test_the_command_prints_the_sentence_and_exits_with_a_code(tmp_path):
    with Job(str(tmp_path), "ddp", "sleeps") as job:
        job.wait_for_fault()
        verdict_of(str(tmp_path), "hung")
        command = Command("why", str(tmp_path), "--seconds", "0.2", "--stacks")
        code, out, _ = command.wait()
        assert code == 4
        assert "rank 1 waits in the script (tests/why_faults.py:" in out.splitlines()[0]
        assert ", rank 0 waits for it in all_reduce of step 4" in out.splitlines()[0]
        assert "_engine_run_backward" in out
        code, out, _ = Command("why", str(tmp_path), "--seconds", "0.2", "--json").wait()
        document = json.loads(out)
        assert (code, document["ranks"], document["phase"]) == (4, [1], "script")


def test_a_stopped_rank_and_a_killed_one(tmp_path):
    with Job(str(tmp_path), "ddp", "slow forward") as job:
        job.wait_for_fault()
        os.kill(job.processes[1].pid, signal.SIGSTOP)
        result = verdict_of(str(tmp_path), "broken")
        assert result.ranks == (1,)
        assert "is stopped (SIGSTOP)" in result.sentence
        os.kill(job.processes[1].pid, signal.SIGKILL)
        result = verdict_of(str(tmp_path), "broken")
        assert (result.ranks, result.sentence.partition(":")[0]) == (
            (1,),
            "rank 1 died without an error",
        )


def _hold_the_interpreter(rank, port, run_dir, pipe):
    ctx = faccel.init(env=env_of(rank, 2, port), run_dir=run_dir, device="cpu")
    if rank == 1:
        pipe.send(1)
        # `PyDLL` does not release the interpreter, as many C extensions do not.
        ctypes.PyDLL(None).sleep(1000)
    faccel.barrier(ctx)


def test_the_line_of_a_rank_that_does_not_release_the_interpreter(tmp_path):
    store = hosted_store()
    receiver, sender = SERVER.Pipe(duplex=False)
    processes = []
    for rank in range(2):
        arguments = (rank, store.port, str(tmp_path), sender)
        processes.append(SERVER.Process(target=_hold_the_interpreter, args=arguments))
        processes[-1].start()
    receiver.recv()
    try:
        result = verdict_of(str(tmp_path), "broken")
    finally:
        for process in processes:
            process.kill()
    assert result.ranks == (1,)
    assert "does not answer" in result.sentence
    assert result.site.startswith("tests/procs/test_why.py:"), result
    assert ", rank 0 waits for it in barrier of step 1" in result.sentence


def _init_only(rank, port, run_dir):
    faccel.init(env=env_of(rank, 2, port), run_dir=run_dir, device="cpu")


def test_ranks_that_wait_in_init_for_one_that_has_not_started(tmp_path):
    store = hosted_store()
    process = SERVER.Process(target=_init_only, args=(0, store.port, str(tmp_path)))
    process.start()
    path = tmp_path / ".faccel" / "rank-00000.json"
    try:
        while not path.exists():
            pass
        result = verdict_of(str(tmp_path), "broken")
    finally:
        process.kill()
    assert result.ranks == (1,)
    assert "rank 1 has not reached `faccel.init`" in result.sentence


SCRIPT = """
import os, signal, sys
import torch
import faccel

with faccel.init() as ctx:
    faccel.reduce(torch.ones(2), ctx)
    if ctx.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    faccel.reduce(torch.ones(2), ctx)
"""


def test_after_a_launch_the_rank_that_was_killed_is_named_with_its_signal(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    run_dir = str(tmp_path / "run")
    launch = ["launch", "--cpu", "--nproc", "2", "--run-dir", run_dir, str(tmp_path / "train.py")]
    code, _, _ = Command(*launch).wait()
    assert code == 128 + signal.SIGKILL
    code, out, _ = Command("why", run_dir).wait()
    assert code == 5
    assert out.splitlines()[0] == "rank 1 died: signal 9"
