"""The verdict of `faccel why` on written snapshots: which rank, phase and line."""

import attrs
import pytest

from faccel.observe import snapshot as states
from faccel.observe.snapshot import Frame, Group, Moment, Snapshot
from faccel.observe.verdict import verdict

TORCH = "/env/site-packages/torch"
FACCEL = "/env/site-packages/faccel"


def user(line, function="main", file="train.py"):
    return Frame(file, line, function, True)


def library(file, function):
    return Frame(file, 1, function, False)


# Innermost frame first, as PyTorch 2.13 and faccel have them.
FETCH = library(f"{TORCH}/utils/data/dataloader.py", "_next_data")
MODULE = library(f"{TORCH}/nn/modules/module.py", "_call_impl")
ENGINE = library(f"{TORCH}/autograd/graph.py", "_engine_run_backward")
ADAM = library(f"{TORCH}/optim/adam.py", "step")
SAVE = library(f"{FACCEL}/checkpoint/save.py", "save")
WAIT = library(f"{FACCEL}/comm/collectives.py", "_run")
REDUCE = library(f"{FACCEL}/comm/tensors.py", "reduce")
C10D = library(f"{TORCH}/distributed/distributed_c10d.py", "all_reduce")
LOOP = user(41)
STACKS = {
    "data": (user(7, "__getitem__"), FETCH, LOOP),
    "forward": (user(9, "forward"), MODULE, LOOP),
    "backward": (user(11, "hook"), ENGINE, LOOP),
    "optimizer": (user(13, "hook"), ADAM, LOOP),
    "checkpoint": (user(15, "state_dict"), SAVE, LOOP),
    "script": (user(17, "read_config"), LOOP),
}
IN_REDUCE = (WAIT, REDUCE, user(50))
IN_BACKWARD = (ENGINE, user(45))  # DDP waits in C++
ALL = Group(ranks=(0, 1, 2, 3), axis="data", op="all_reduce", is_pending=True)


def rank(number, *moments, groups=None, **fields):
    """Return a rank; a moment is `(stack, numbers)` with what differs from the defaults."""
    values = []
    for index, (stack, numbers, *rest) in enumerate(moments):
        values.append(Moment(float(index), stack, numbers, *rest))
    fields.setdefault("step", 811)
    return Snapshot(number, moments=values, groups=groups or {"data": ALL}, **fields)


def still(number, stack, numbers, *rest, **fields):
    """Return a rank that does not move."""
    return rank(number, *[(stack, numbers, *rest)] * 3, **fields)


def test_the_sentence_of_a_rank_that_waits_for_its_data():
    waiting = [still(number, IN_BACKWARD, {"data": 8}) for number in range(3)]
    late = still(3, STACKS["data"], {"data": 7})
    result = verdict([*waiting, late])
    assert result.sentence == (
        "rank 3 waits in the DataLoader (train.py:7), ranks 0-2 wait for it in all_reduce of step "
        "812"
    )
    assert (result.kind, result.ranks, result.phase, result.site) == (
        "hung",
        (3,),
        "data",
        "train.py:7",
    )


@pytest.mark.parametrize("late", range(4))
@pytest.mark.parametrize("phase", STACKS)
@pytest.mark.parametrize("wait", [IN_REDUCE, IN_BACKWARD])
def test_a_hang_is_of_the_rank_that_has_begun_fewer_collectives(late, phase, wait):
    ranks = [still(number, wait, {"data": 8}) for number in range(4)]
    ranks[late] = still(late, STACKS[phase], {"data": 7})
    result = verdict(ranks)
    assert (result.kind, result.ranks, result.phase) == ("hung", (late,), phase)
    assert result.site == STACKS[phase][0].site


@pytest.mark.parametrize("late", range(4))
@pytest.mark.parametrize("phase", STACKS)
def test_a_slow_rank_is_the_one_that_the_others_wait_for(late, phase):
    # Steps of 10 moments: the slow rank computes for 8 of them, the others wait meanwhile.
    def moments(is_late):
        rows = []
        for step in range(20):
            for part in range(10):
                number = step
                if not is_late and part < 8:
                    rows.append((IN_BACKWARD, {"data": number + 1}))
                elif part < 8:
                    rows.append((STACKS[phase], {"data": number}, 1.0))
                else:
                    rows.append((STACKS["script"], {"data": number + 1}, 1.0))
        return rows

    result = verdict([rank(number, *moments(number == late)) for number in range(4)])
    assert (result.kind, result.ranks, result.phase) == ("slow", (late,), phase)


def test_ranks_that_are_late_in_turn_are_equally_fast():
    def moments(number):
        rows = []
        for step in range(40):
            is_late = step % 4 == number
            rows.append((STACKS["forward"], {"data": step if is_late else step + 1}, 1.0))
        return rows

    result = verdict([rank(number, *moments(number)) for number in range(4)])
    assert (result.kind, result.ranks) == ("even", ())
    assert "forward 100%" in result.sentence


def test_the_garbage_collector_keeps_the_interpreter_so_its_pause_has_no_moments():
    moving = [(IN_BACKWARD, {"data": 8})] * 9 + [(STACKS["forward"], {"data": 9})]
    late = rank(1, (STACKS["forward"], {"data": 7}), pauses=[(0.5, 8.5)])
    late = attrs.evolve(
        late, moments=[*late.moments, Moment(9.0, STACKS["forward"], {"data": 8}, 1.0)]
    )
    result = verdict([rank(0, *moving), late])
    assert (result.kind, result.ranks, result.phase) == ("slow", (1,), "garbage collection")


def test_a_wait_is_followed_over_the_axes_of_the_mesh():
    # Rank 1 is late for its `tp` peer 0, and so rank 0 is late for its `dp` peer 2.
    groups = {"tp": Group((0, 1), "tp"), "dp": Group((0, 2), "dp")}
    ranks = [
        still(0, IN_REDUCE, {"tp 0": 5, "dp 0": 7}, groups={"tp 0": Group((0, 1)), **groups}),
        still(1, STACKS["forward"], {"tp 0": 4, "dp 1": 7}),
        still(2, IN_REDUCE, {"tp 1": 5, "dp 0": 8}),
        still(3, IN_REDUCE, {"tp 1": 5, "dp 1": 8}),
    ]
    ranks = [attrs.evolve(each, groups=dict.fromkeys(NAMES, ALL)) for each in ranks]
    result = verdict(ranks)
    assert (result.ranks, result.phase) == ((1,), "forward")


NAMES = ("tp 0", "tp 1", "dp 0", "dp 1")


def test_several_late_ranks_are_named_by_their_axis():
    ranks = [
        still(number, IN_REDUCE, {"data": 8}, coordinates={"dp": number // 2, "tp": number % 2})
        for number in range(4)
    ]
    for number in (1, 3):
        ranks[number] = attrs.evolve(
            still(number, STACKS["data"], {"data": 7}), coordinates=ranks[number].coordinates
        )
    result = verdict(ranks)
    assert result.ranks == (1, 3)
    assert result.sentence.startswith("ranks 1, 3 (tp=1) wait in the DataLoader (train.py:7), ")
    assert result.sentence.endswith("ranks 0, 2 (tp=0) wait for them in reduce of step 812")


def test_messages_of_a_pipeline_are_no_collectives():
    # Rank 0 has sent more messages, and is not waiting for rank 1 because of that.
    groups = {"pp": Group((0, 1), "pp", has_messages=True), "data": ALL}
    ranks = [
        still(0, IN_BACKWARD, {"pp": 9, "data": 7}, groups=groups),
        still(1, IN_REDUCE, {"pp": 3, "data": 8}, groups=groups),
    ]
    result = verdict(ranks)
    assert (result.ranks, result.phase) == ((0,), "backward")
    assert result.sentence.startswith("rank 0 waits in backward (train.py:45), rank 1 waits for it")


@pytest.mark.parametrize(
    ("stack", "load"), [(STACKS["script"], 0.0), (IN_BACKWARD, 0.95), (STACKS["forward"], 0.95)]
)
def test_a_collective_in_flight_is_no_wait(stack, load):
    # Rank 1 has begun a collective of `b` without waiting for it, and is late in `a`.
    groups = {"a": ALL, "b": ALL}
    ranks = [
        still(0, IN_REDUCE, {"a": 5, "b": 8}, groups=groups),
        still(1, stack, {"a": 4, "b": 9}, load, groups=groups),
        still(2, STACKS["forward"], {"a": 5, "b": 9}, 0.95, groups=groups),
    ]
    assert verdict(ranks).ranks == (1,)


def test_a_module_that_is_called_in_backward_is_a_part_of_it():
    ranks = [still(number, IN_REDUCE, {"data": 8}) for number in range(2)]
    stack = (user(9, "forward"), MODULE, ENGINE, LOOP)  # as activation checkpointing does
    ranks[1] = still(1, stack, {"data": 7})
    assert verdict(ranks).phase == "backward"


def test_a_rank_that_skips_a_collective_waits_in_another_one():
    groups = {"data": ALL, "own": Group((0, 1, 2, 3), op="all_reduce")}
    ranks = [
        still(number, (C10D, user(60)), {"own": 4, "data": 8}, groups=groups) for number in range(4)
    ]
    ranks[2] = still(2, IN_BACKWARD, {"own": 3, "data": 9}, groups=groups)
    result = verdict(ranks)
    assert (result.kind, result.ranks, result.phase) == ("hung", (2,), "backward")
    assert result.sentence == (
        "rank 2 waits in all_reduce (train.py:45) and did not call all_reduce (train.py:60), ranks "
        "0-1, 3 wait for it in all_reduce of step 812"
    )


def test_of_two_ranks_that_disagree_the_one_that_came_last_is_named():
    for last in range(2):
        ranks = []
        for number in range(2):
            group = attrs.evolve(ALL, arrivals={8: 10.0 + (number == last)})
            stack = (C10D, user(60)) if number else IN_REDUCE
            numbers = {"a": 4 + number, "data": 8 - number}
            groups = {"data": group, "a": ALL}
            ranks.append(still(number, stack, numbers, groups=groups))
        assert verdict(ranks).ranks == (last,)


@pytest.mark.parametrize("num_buckets", [1, 2, 3])
@pytest.mark.parametrize("odd", range(2))
@pytest.mark.parametrize("is_later", [False, True])
def test_of_two_ranks_the_one_that_breaks_the_order_of_its_steps_has_skipped(
    num_buckets, odd, is_later
):
    # Each step reduces the buckets of DDP, and then a metric, which one rank skips in step 5.
    ranks = []
    for number in range(2):
        calls = (["data"] * num_buckets + ["own"]) * 5 + ["data"] * num_buckets
        calls.append("data" if number == odd else "own")
        times = [float(index) for index in range(len(calls))]
        times[-1] += (number == odd) == is_later
        groups, numbers = {}, {}
        for name in ("data", "own"):
            own_times = [time for time, call in zip(times, calls, strict=True) if call == name]
            groups[name] = attrs.evolve(ALL, arrivals=dict(enumerate(own_times)))
            numbers[name] = len(own_times)
        stack = IN_BACKWARD if number == odd else (C10D, user(60))
        ranks.append(still(number, stack, numbers, groups=groups))
    result = verdict(ranks)
    assert (result.kind, result.ranks, result.phase) == ("hung", (odd,), "backward")


def test_all_ranks_in_one_collective_are_the_network():
    result = verdict([still(number, IN_REDUCE, {"data": 8}) for number in range(4)])
    assert (result.kind, result.ranks) == ("hung", ())
    assert result.sentence == "every rank waits in reduce (train.py:50), which does not end"


def test_a_computing_rank_differs_from_a_waiting_one_in_its_use_of_the_processor():
    waiting = still(0, IN_REDUCE, {"data": 8})
    for load, verb in ((0.0, "waits"), (0.95, "computes")):
        result = verdict([waiting, still(1, STACKS["script"], {"data": 7}, load)])
        assert result.sentence.startswith(f"rank 1 {verb} in the script (train.py:17)")


def test_ranks_that_all_compute_in_a_long_step_do_not_hang():
    ranks = [still(number, STACKS["forward"], {"data": 7}, 0.9) for number in range(4)]
    result = verdict(ranks)
    assert (result.kind, result.ranks, result.phase) == ("even", (), "forward")
    ranks[2] = still(2, STACKS["data"], {"data": 7})
    assert verdict(ranks).kind == "even"


def test_ranks_that_all_wait_for_their_data_are_named_together():
    ranks = [still(number, STACKS["data"], {"data": 7}) for number in range(4)]
    result = verdict(ranks)
    assert (result.kind, result.ranks, result.phase) == ("hung", (0, 1, 2, 3), "data")
    assert result.sentence == "ranks 0-3 wait in the DataLoader (train.py:7)"


BROKEN = {
    states.DEAD: "died without an error: process 7 has ended",
    states.FAILED: "failed: ValueError: no",
    states.SILENT: "does not answer: process 7 is stopped (SIGSTOP)",
    states.FOREIGN: "runs as another user, process 7",
    states.MISSING: "has not reached `faccel.init`: it has written no file",
}


@pytest.mark.parametrize("status", BROKEN)
def test_a_rank_that_does_not_answer_is_the_cause(status):
    ranks = [still(number, IN_REDUCE, {"data": 8}) for number in range(2)]
    ranks.append(Snapshot(2, status, BROKEN[status]))
    result = verdict(ranks)
    assert (result.kind, result.ranks) == ("broken", (2,))
    assert result.sentence == (
        f"rank 2 {BROKEN[status]}, ranks 0-1 wait for it in reduce of step 812"
    )
    assert result.next_step


def test_the_first_failure_is_the_cause_of_the_others():
    cause = Snapshot(2, states.FAILED, "failed: ValueError: no", time_s=12.0)
    consequence = Snapshot(0, states.CONSEQUENCE, "failed: RankFailedError: x", time_s=11.0)
    later = Snapshot(1, states.FAILED, "failed: KeyError: 'x'", time_s=13.0)
    result = verdict([consequence, later, cause])
    assert (result.ranks, result.sentence) == ((2,), "rank 2 failed: ValueError: no")
    dead = Snapshot(3, states.DEAD, "died: signal 9")
    assert verdict([consequence, dead]).ranks == (3,)


def test_a_run_that_has_ended_is_no_hang():
    ranks = [Snapshot(number, states.FINISHED, "has closed its context") for number in range(2)]
    result = verdict(ranks)
    assert (result.kind, result.ranks) == ("ended", ())


def test_ranks_of_another_node_are_asked_there():
    remote = [Snapshot(number, states.REMOTE, "runs on b", host="b") for number in (2, 3)]
    local = [still(number, IN_REDUCE, {"data": 8}) for number in (0, 1)]
    result = verdict([*local, *remote])
    assert result.sentence == (
        "every rank of this node waits for a rank of another one: ranks 0-1 wait for it in reduce "
        "of step 812"
    )
    assert verdict(remote).sentence == "no rank runs on this node; its ranks are on b"
    assert "ranks 2-3: run on b" in result.evidence


def test_equal_ranks_have_one_line_of_evidence():
    ranks = [still(number, IN_REDUCE, {"data": 8}) for number in range(4)]
    ranks[3] = still(3, STACKS["data"], {"data": 7}, loader="of its 2 worker processes 2 sleep")
    assert verdict(ranks).evidence == (
        "ranks 0-2: wait in reduce (train.py:50)",
        "rank 3: is in the DataLoader (train.py:7); of its 2 worker processes 2 sleep",
    )


def test_arrival_times_are_evidence_of_a_slow_rank():
    ranks = []
    for number in range(2):
        arrivals = {step: 10.0 * step + 8.0 * number for step in range(1, 11)}
        group = attrs.evolve(ALL, arrivals=arrivals)
        rows = []
        for step in range(10):
            for part in range(10):
                has_begun = number == 0 or part >= 8
                rows.append(
                    (IN_BACKWARD if has_begun else STACKS["backward"], {"data": step + has_begun})
                )
        ranks.append(rank(number, *rows, groups={"data": group}))
    result = verdict(ranks)
    assert (result.kind, result.ranks, result.phase) == ("slow", (1,), "backward")
    assert result.evidence[0] == (
        "rank 1 began the 10 collectives of 99.0 s 80000 ms after the first rank, in total"
    )
