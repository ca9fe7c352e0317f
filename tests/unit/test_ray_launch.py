"""`faccel.launch(..., on=...)` without a cluster: ranks, resources, restarts and errors."""

import importlib.util
from contextlib import contextmanager

import pytest

import faccel
from faccel.errors import ConfigError, LaunchError, RankFailedError
from faccel.launching.rank_outcomes import results_of
from faccel.launching.ray_launch import rank_resources
from faccel.launching.ray_rank import Location, Outcome, rank_order, rank_variables
from faccel.runtime.detect import detect

DONE = Outcome(result=b"done")
SAVED = Outcome(exit_code=75)
FAILED = Outcome(exit_code=1, error="ValueError: bad sample")
FAILED_LATER = Outcome(exit_code=1, error="KeyError: 3")
LOST_PEER = Outcome(exit_code=1, error="RankFailedError: rank 1 failed", is_consequence=True)
TIMEOUT = None

# What the driver sees in each attempt -> its errors, and the ranks that it ended.
ALL_DONE = [(1, DONE), (0, DONE)]
RUNS = {
    "results are in rank order": ([[(1, Outcome(b"1")), (0, Outcome(b"0"))]], 0, [b"0", b"1"]),
    "a failure without a restart": ([[(1, FAILED)]], 0, "rank 1 of 2 failed. Got ValueError"),
    "a failure with a restart": ([[(1, FAILED)], ALL_DONE], 1, [b"done"] * 2),
    "a result, then a failure": ([[(0, DONE), (1, FAILED)], ALL_DONE], 1, [b"done"] * 2),
    "more failures than restarts": ([[(1, FAILED)], [(0, FAILED_LATER)]], 1, "Got KeyError: 3"),
    "a consequence before its cause": ([[(0, LOST_PEER), (1, FAILED)]], 0, "rank 1 of 2 failed"),
    "a consequence alone": ([[(0, LOST_PEER), TIMEOUT]], 0, "rank 0 of 2 failed"),
    "preemptions count as no restart": (
        [[(0, SAVED), (1, SAVED)], [(1, SAVED), (0, SAVED)], ALL_DONE],
        0,
        [b"done"] * 2,
    ),
    "one rank saved and the other had returned": (
        [[(0, DONE), (1, SAVED)], ALL_DONE],
        0,
        [b"done"] * 2,
    ),
    "the other rank waited for the one that saved": (
        [[(0, SAVED), (1, LOST_PEER)], ALL_DONE],
        0,
        [b"done"] * 2,
    ),
    "a failure is stronger than a saved checkpoint": ([[(0, SAVED), (1, FAILED)]], 0, "rank 1"),
}


class FakeRanks:
    """The ranks of one attempt, which end in a given order."""

    def __init__(self, events):
        self._events = list(events)
        self.has_timeout = []
        self.ended = []

    def wait(self, timeout_s):
        self.has_timeout.append(timeout_s is not None)
        event = self._events.pop(0)
        assert event is not TIMEOUT or timeout_s is not None, "the driver would wait forever"
        return event

    def end(self, rank):
        self.ended.append(rank)


def run(attempts, max_restarts):
    """Return the results or the error, and the ranks of each attempt that was started."""
    started = []

    @contextmanager
    def start(attempt):
        assert attempt == len(started)
        started.append(FakeRanks(attempts[attempt]))
        yield started[-1]

    try:
        return results_of(start, 2, max_restarts), started
    except RankFailedError as error:
        return error, started


@pytest.mark.parametrize("name", RUNS)
def test_the_outcomes_of_the_ranks_determine_restart_result_and_error(name):
    attempts, max_restarts, expected = RUNS[name]
    result, started = run(attempts, max_restarts)
    assert len(started) == len(attempts)
    if isinstance(expected, list):
        assert result == expected
    else:
        assert expected in str(result)
    for events, ranks in zip(attempts, started, strict=True):
        # A rank that waits for one without a result gets an error, as if that were a process.
        failed = [event[0] for event in events if event and event[1].exit_code]
        assert ranks.ended == failed


def test_the_driver_waits_without_a_limit_for_ranks_that_save():
    _, started = run([[(0, SAVED), (1, SAVED)], ALL_DONE], 0)
    assert started[0].has_timeout == [False, False]


def test_a_restart_is_logged_with_the_failure_and_the_restarts_that_are_left(log_records):
    run([[(1, FAILED)], [(1, FAILED)], ALL_DONE], 2)
    texts = [record.getMessage() for record in log_records()]
    expected = "rank 1 of 2 failed. Got ValueError: bad sample\nrestarting all ranks; "
    assert texts == [f"{expected}restarts left: {left}" for left in (1, 0)]


# Node of each actor -> by rank: actor, node rank, local rank, local world size, visible GPUs.
PLACEMENTS = {
    "a": [(0, 0, 0, 1, "2")],
    "aa": [(0, 0, 0, 2, "2,3"), (1, 0, 1, 2, "2,3")],
    "ab": [(0, 0, 0, 1, "2"), (1, 1, 0, 1, "2")],
    "bab": [(0, 0, 0, 2, "2,3"), (2, 0, 1, 2, "2,3"), (1, 1, 0, 1, "2")],
    "abba": [(0, 0, 0, 2, "2,3"), (3, 0, 1, 2, "2,3"), (1, 1, 0, 2, "2,3"), (2, 1, 1, 2, "2,3")],
}


@pytest.mark.parametrize("has_gpus", [False, True])
@pytest.mark.parametrize("nodes", PLACEMENTS)
def test_the_nodes_of_the_actors_determine_ranks_addresses_and_gpus(nodes, has_gpus):
    locations = []
    for index, node in enumerate(nodes):
        gpu_ids = (str(2 + nodes[:index].count(node)),) if has_gpus else ()
        locations.append(Location(node, f"10.0.0.{node}", gpu_ids, "HIP_VISIBLE_DEVICES"))
    order = rank_order(locations)
    variables = rank_variables([locations[index] for index in order], 1234, 3)
    by_rank = []
    for rank, env in enumerate(variables):
        topology = detect(env)
        assert (topology.rank, topology.world_size, topology.attempt) == (rank, len(nodes), 3)
        address = f"10.0.0.{nodes[0]}" if len(set(nodes)) > 1 else "127.0.0.1"
        assert (topology.main_address, topology.main_port) == (address, 1234)
        assert topology.num_nodes == len(set(nodes))
        place = (topology.node_rank, topology.local_rank, topology.local_world_size)
        by_rank.append((order[rank], *place, env.get("HIP_VISIBLE_DEVICES")))
    if has_gpus:
        assert by_rank == PLACEMENTS[nodes]
    else:
        assert by_rank == [(*place, None) for *place, _ in PLACEMENTS[nodes]]


@pytest.mark.parametrize(
    ("resources", "device", "num_gpus", "expected"),
    [
        (None, None, 0, ({"CPU": 1}, "cpu")),
        (None, None, 2, ({"CPU": 1, "GPU": 1}, "cuda")),
        (None, "cpu", 2, ({"CPU": 1}, "cpu")),
        (None, "cuda", 0, ({"CPU": 1, "GPU": 1}, "cuda")),
        ({"CPU": 4}, None, 2, ({"CPU": 4}, "cpu")),
        ({"GPU": 1}, "cuda:1", 2, ({"GPU": 1}, "cuda:1")),
        ({"CPU": 4, "GPU": 0}, None, 2, ({"CPU": 4}, "cpu")),
        ({"CPU": 4, "GPU": 1.0}, None, 0, ({"CPU": 4, "GPU": 1.0}, "cuda")),
        ({"GPU": 1, "accelerator_type:H100": 0.001}, "cuda", 2,
         ({"GPU": 1, "accelerator_type:H100": 0.001}, "cuda")),
    ],
)  # fmt: skip
def test_the_resources_of_a_rank_and_its_device_agree(resources, device, num_gpus, expected):
    assert rank_resources(resources, device, num_gpus) == expected


# A part of the message -> options of `launch`. All are found before Ray is imported.
INVALID = {
    "use `ray` (allowed: `local`, `ray`)": {"on": "rya"},
    "`on` must be one of 'local', 'ray'. Got None": {"on": None},
    "`on` must be one of 'local', 'ray'. Got ['ray']": {"on": ["ray"]},
    'without `on="ray"`.\nTo fix: add `on="ray"`, or remove `resources`': {"resources": {"CPU": 1}},
    "or run `faccel launch --max-restarts 1 train.py`": {"max_restarts": 1},
    "use `max_restarts=0` or more": {"on": "ray", "max_restarts": -1},
    "Got max_restarts=True": {"on": "ray", "max_restarts": True},
    "`num_processes` must be a positive int": {"on": "ray", "num_processes": 0},
    "`fn` must be a function": {"on": "ray", "fn": 3},
    "use `seed`": {"on": "ray", "config": {"sed": 1}},
    "`resources` must be a dict": {"on": "ray", "resources": 2},
    "`resources[3]` must be a number": {"on": "ray", "resources": {3: 1}},
    "`resources['CPU']` must be a number": {"on": "ray", "resources": {"CPU": "1"}},
    "`resources['disk']` must be a number": {"on": "ray", "resources": {"disk": -1}},
    '`resources["GPU"]` must be 0 or 1': {"on": "ray", "resources": {"GPU": 0.5}},
    "CPUs or CUDA GPUs, not `privateuseone`": {"on": "ray", "config": {"device": "privateuseone"}},
    "not `tpu`": {"on": "ray", "config": {"device": "tpu"}},
    'write `resources={"CPU": 1}`': {
        "on": "ray", "config": {"device": "cpu"}, "resources": {"GPU": 1},
    },
    'write `resources={"CPU": 1, "GPU": 1}`': {
        "on": "ray", "config": {"device": "cuda:0"}, "resources": {"CPU": 1},
    },
}  # fmt: skip


@pytest.mark.parametrize("message", INVALID)
def test_an_invalid_option_is_an_error_with_a_fix(message):
    options = {"num_processes": 2, **INVALID[message]}
    fn = options.pop("fn", print)
    with pytest.raises((ConfigError, LaunchError)) as caught:
        faccel.launch(fn, **options)
    assert message in str(caught.value)
    assert caught.value.fix


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is installed")
def test_without_ray_the_error_names_the_extra():
    with pytest.raises(LaunchError, match=r'run `pip install "faccel\[ray\]"`'):
        faccel.launch(print, on="ray", num_processes=2)
