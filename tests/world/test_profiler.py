"""Profiles: spans of ranks by injected sleeps, clocks by arithmetic, and one trace of all ranks."""

import gzip
import json
import random
import time

import pytest
import torch
from torch import nn
from torch.profiler import schedule
from torch.utils.data import DataLoader, TensorDataset

import faccel
from faccel.errors import ConfigError
from faccel.testing import fake_context, simulate
from faccel.tracking import profile, trace_files
from faccel.tracking.clock_offsets import offsets_of
from faccel.tracking.spans import SPANS, intervals_of, seconds_of
from tests.ranks import run_ranks

SLEEP_S = 0.05
NUM_STEPS = 3


class Slow(nn.Module):
    """A layer whose forward takes some seconds."""

    def __init__(self, seconds):
        super().__init__()
        self.linear, self.seconds = nn.Linear(4, 1), seconds

    def forward(self, x):
        time.sleep(self.seconds)
        return self.linear(x)


def train(ctx, profiler, folder, seconds=0.0):
    model = faccel.wrap(Slow(seconds), ctx)
    opt = faccel.wrap_optimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, ctx)
    scaler = faccel.init_scaler(ctx)
    dataset = TensorDataset(torch.ones(NUM_STEPS * 2 * ctx.world_size, 4))
    for (x,) in faccel.shard(DataLoader(dataset, 2), ctx).at(0):
        scaler = faccel.scaled_backward(model(x).mean(), scaler, ctx)
        _, scaler = faccel.optimizer_step(opt, scaler, ctx)
        profiler.step()
    faccel.save({"model": model}, folder, ctx, step=1)


def events_of(path):
    with gzip.open(path, "rt") as file:
        return json.load(file)["traceEvents"]


def spans_of(path, rank):
    return [e for e in events_of(path) if e.get("cat") == "faccel" and e["pid"] == rank]


def test_a_rank_of_a_simulation_has_each_span_of_its_steps(tmp_path):
    path = tmp_path / "new" / "profile.json.gz"

    def fn(ctx):
        with profile(ctx, path=path, ranks=(0,)) as profiler:
            train(ctx, profiler, tmp_path / "checkpoints")
        assert not ctx.lifetime.has_spans
        return profiler.summary

    first, second = simulate(fn, 2)
    assert first == second
    assert list(first.seconds) == [0]
    assert (first.num_steps, first.missing, first.clock_error_s) == (NUM_STEPS, {}, 0)
    # gloo is not simulated
    assert {span for span, seconds in first.seconds[0].items() if seconds} >= {
        *("data", "forward", "backward", "optimizer", "checkpoint"),
    }
    names = [event["name"] for event in spans_of(path, 0)]
    assert [names.count(name) for name in ("forward", "optimizer", "checkpoint")] == [3, 3, 1]
    assert list(path.parent.iterdir()) == [path]


def test_plain_torch_has_spans_that_pytorch_names(tmp_path):
    model = nn.Linear(4, 1)
    opt = torch.optim.AdamW(model.parameters())
    path = tmp_path / "profile.json"
    with profile(fake_context(0, 1), path=path) as profiler:
        for (x,) in DataLoader(TensorDataset(torch.ones(4, 4)), 2):
            with torch.profiler.record_function("forward"):
                loss = model(x).mean()
            loss.backward()
            opt.step()
            profiler.step()
    seconds = profiler.summary.seconds[0]
    assert {span for span in SPANS if seconds[span]} == {"data", "forward", "backward", "optimizer"}
    assert any(e["name"] == "aten::addmm" for e in json.loads(path.read_text())["traceEvents"])


def test_only_the_steps_of_the_schedule_are_recorded(tmp_path):
    path = tmp_path / "profile.json.gz"
    options = {"schedule": schedule(wait=1, warmup=1, active=2, repeat=2), "path": path}
    with profile(fake_context(0, 1), **options) as profiler:
        for _ in range(9):
            with torch.profiler.record_function("forward"):
                pass
            profiler.step()
    assert profiler.summary.num_steps == 4
    assert len(spans_of(path, 0)) == 4


def test_a_schedule_that_ends_before_it_records_leaves_an_empty_trace(tmp_path):
    path = tmp_path / "profile.json.gz"
    with profile(fake_context(0, 1), schedule=schedule(wait=9, warmup=1, active=1), path=path) as p:
        p.step()
    assert p.summary.num_steps == 0
    assert set(p.summary.seconds[0].values()) == {0}
    assert {event["ph"] for event in events_of(path)} == {"M"}


def test_an_error_ends_the_profile_and_leaves_the_trace_of_the_rank(tmp_path):
    ctx, path = fake_context(0, 1), tmp_path / "profile.json.gz"
    with pytest.raises(KeyError), profile(ctx, path=path) as profiler:
        torch.ones(1)
        raise KeyError
    assert not ctx.lifetime.has_spans
    assert not path.exists()
    assert trace_files.read_rank(trace_files.rank_file(path, 0)).events
    with pytest.raises(ConfigError, match="after the `with` statement"):
        _ = profiler.summary
    with profile(ctx, path=path):  # the next one can begin
        pass
    assert path.exists()


def test_a_rank_whose_trace_is_missing_is_named_and_the_others_are_merged(tmp_path):
    path = tmp_path / "profile.json.gz"
    trace_files.rank_folder(path).mkdir()
    # Both times are of the clock of rank 0: the step of rank 2 begins 5 us after the other.
    for rank, base_ns in ((0, 7000), (2, 12_000)):
        step = {"ph": "X", "name": "step", "ts": 1.0, "dur": 2.0, "pid": rank, "tid": 9}
        trace = trace_files.RankTrace(rank, f"node{rank}", base_ns, [step])
        trace_files.write_rank(trace, trace_files.rank_file(path, rank))
    trace_files.rank_file(path, 3).write_bytes(b"\x1f\x8b cut")
    missing = trace_files.merge(path, [0, 1, 2, 3], 7000)
    assert sorted(missing) == [1, 3]
    assert "rank-00001.json.gz" in missing[1]
    steps = [(e["pid"], e["ts"]) for e in events_of(path) if e["name"] == "step"]
    assert steps == [(0, 1.0), (2, 6.0)]
    names = [e["args"]["name"] for e in events_of(path) if e["name"] == "process_name"]
    assert names == ["rank 0 (node0)", "rank 2 (node2)"]
    # the others can be copied there, and merged again
    assert trace_files.rank_file(path, 0).exists()


def torch_trace(base_ns, start_us):
    """Return what PyTorch writes of a range of 10 us, a mark before it, and a flow."""
    place = {"pid": 4711, "tid": 12}
    return {
        "baseTimeNanoseconds": base_ns,
        "traceEvents": [
            {"ph": "i", "name": "[memory]", "ts": start_us - 1.5, **place},
            {"ph": "X", "name": "data", "ts": start_us, "dur": 10.0, **place},
            {"ph": "s", "id": 5, "name": "fwdbwd", "ts": start_us + 1, **place},
        ],
    }


def merged(path, clocks_ns, start_us):
    """Return the events of ranks that have recorded one moment, each by its clock."""
    trace_files.rank_folder(path).mkdir()
    bases = []
    for rank, clock_ns in enumerate(clocks_ns):
        document = torch_trace(10**18 + clock_ns, start_us[rank])
        trace, _ = trace_files.from_torch([document], rank, "node", -clock_ns)
        trace_files.write_rank(trace, trace_files.rank_file(path, rank))
        bases.append(trace.base_ns)
    assert not trace_files.merge(path, range(len(clocks_ns)), min(bases))
    return events_of(path)


# The clock of each rank in nanoseconds, and when it begins, in microseconds on a true clock.
CLOCKS = {
    "one clock": ((0, 0), (100.0, 100.0)),
    "rank 1 begins first": ((0, 0), (100.0, 40.25)),
    "a clock is a week ahead": ((0, 7 * 86400 * 10**9, 7 * 86400 * 10**9), (9.5, 7.0, 8.0)),
    "a clock is late": ((0, -(10**9)), (5.0, 6.0)),
}


@pytest.mark.parametrize("name", CLOCKS)
def test_the_events_of_all_ranks_are_on_one_clock_that_begins_at_0(tmp_path, name):
    clocks_ns, start_us = CLOCKS[name]
    events = merged(tmp_path / "profile.json.gz", clocks_ns, start_us)
    first_us = min(start_us) - 1.5
    ranges = {e["pid"]: e["ts"] for e in events if e["name"] == "data" and e["tid"] > len(SPANS)}
    assert ranges == {rank: time - first_us for rank, time in enumerate(start_us)}
    # Perfetto drops events before 0.
    assert min(event["ts"] for event in events) == 0


def test_ranks_have_tracks_with_numbers_that_differ_in_perfetto(tmp_path):
    events = merged(tmp_path / "profile.json.gz", (0, 0, 0), (0.0, 0.0, 0.0))
    # Track 0 is the main thread, which has the number of the process.
    used = {(event["pid"], event["tid"]) for event in events if event["ph"] != "M"}
    assert not any(track == 0 for _, track in used)
    named = [(e["pid"], e["tid"]) for e in events if e["name"] == "thread_name"]
    assert sorted(named) == sorted(used)
    flows = [event["id"] for event in events if event["ph"] == "s"]
    assert len(set(flows)) == 3


def test_a_name_with_quotes_does_not_lose_the_trace(tmp_path):
    path = tmp_path / "profile.json.gz"
    with (
        profile(fake_context(0, 1), path=path) as profiler,
        torch.profiler.record_function('a "quoted", "'),
    ):
        torch.ones(2) + 1
    assert not profiler.summary.missing
    assert [e for e in events_of(path) if e["name"] == 'a "quoted", "']


@pytest.mark.parametrize("seed", range(20))
def test_the_clock_of_another_node_is_within_the_error_of_its_estimate(seed):
    draw = random.Random(seed)
    shifts = [0, 0, draw.randint(-(10**9), 10**9)]
    shifts.append(shifts[2])
    starts, ends, now = [], [], 10**18
    for _ in range(5):
        entered = [now + draw.randint(0, 10**5) for _ in range(4)]
        left = [max(entered) + draw.randint(0, 10**5) for _ in range(4)]
        starts.append([time_ns - shift for time_ns, shift in zip(entered, shifts, strict=True)])
        ends.append([time_ns - shift for time_ns, shift in zip(left, shifts, strict=True)])
        now = max(left)
    offsets = offsets_of(starts, ends, ["a", "a", "b", "b"])
    assert [offset.offset_ns for offset in offsets[:2]] == [0, 0]
    assert offsets[2] == offsets[3]
    assert abs(offsets[2].offset_ns - shifts[2]) <= offsets[2].error_ns <= 10**5


def test_spans_that_overlap_count_once():
    def event(name, start, end, **fields):
        return {"name": name, "ts": start, "dur": end - start, **fields}

    events = [
        event("gloo:all_reduce", 0, 10),
        event("c10d::allreduce_", 5, 12),
        event("gloo:barrier", 20, 21),
        event("autograd::engine::evaluate_function: A", 0, 10),
        event("autograd::engine::evaluate_function: B", 60, 70),
        event("autograd::engine::evaluate_function: C", 1000, 1010),
        event("forward", 0, 9, cat="gpu_user_annotation"),
        event("aten::mm", 0, 9),
    ]
    intervals = intervals_of(events)
    assert intervals == {
        "communication": [(0, 12), (20, 21)],
        "backward": [(0, 70), (1000, 1010)],
    }
    assert seconds_of(intervals)["communication"] == pytest.approx(13e-6)


def profile_processes(ctx, folder):
    path = f"{folder}/profile.json.gz"
    with profile(ctx, path=path) as profiler:
        train(ctx, profiler, f"{folder}/checkpoints", SLEEP_S * ctx.rank)
    return profiler.summary


@pytest.mark.slow
def test_processes_have_one_trace_that_shows_the_slow_rank(tmp_path):
    first, second = run_ranks(profile_processes, 2, str(tmp_path))
    assert first == second
    seconds = first.seconds
    assert seconds[1]["forward"] >= NUM_STEPS * SLEEP_S
    assert seconds[0]["forward"] <= seconds[1]["forward"] - 0.8 * NUM_STEPS * SLEEP_S
    names = [e["args"]["name"] for e in events_of(first.path) if e["name"] == "process_name"]
    assert [name.split(" (")[0] for name in names] == ["rank 0", "rank 1"]
    reductions = [reductions_of(first.path, rank) for rank in range(2)]
    assert len(reductions[0]) == len(reductions[1]) >= NUM_STEPS
    # No rank leaves an all-reduce of gradients before both have entered it, so the clocks agree.
    for (start, end), (other_start, other_end) in zip(*reductions, strict=True):
        assert max(start, other_start) <= min(end, other_end)
    # Rank 0 waits in them for rank 1.
    waits = [sum(end - start for start, end in pairs) / 1e6 for pairs in reductions]
    assert waits[0] - waits[1] >= SLEEP_S


def reductions_of(path, rank):
    return sorted(
        (event["ts"], event["ts"] + event["dur"])
        for event in events_of(path)
        if event["name"] == "gloo:all_reduce" and event["pid"] == rank
    )


def profile_again(ctx, path):
    profiler = profile(ctx, path=path)
    for _ in range(2):
        with profiler:
            pass


def profile_in_a_profile_of_torch(ctx, path):
    with torch.profiler.profile(), profile(ctx, path=path):
        pass


def profile_twice(ctx, path):
    with profile(ctx, path=path), profile(ctx, path=path):
        pass


WRONG = {
    "a file": (lambda ctx, tmp: profile(ctx, path=tmp), "`path` must be a file"),
    "an int as schedule": (lambda ctx, tmp: profile(ctx, schedule=3), "`schedule` must be"),
    "another function": (lambda ctx, tmp: profile(ctx, schedule=str), "`schedule` must be"),
    "a rank": (lambda ctx, tmp: profile(ctx, ranks=0), "`ranks` must be a list"),
    "an unknown rank": (lambda ctx, tmp: profile(ctx, ranks=(1,)), "`ranks` must be ranks of"),
    "no context": (lambda ctx, tmp: profile(3), r"with faccel.tracking.profile\(ctx\)"),
    "again": (lambda ctx, tmp: profile_again(ctx, tmp / "p.json"), "can be opened once"),
    "PyTorch's profile": (
        lambda ctx, tmp: profile_in_a_profile_of_torch(ctx, tmp / "p.json"),
        "has an open profile",
    ),
    "two profiles": (lambda ctx, tmp: profile_twice(ctx, tmp / "p.json"), "has an open profile"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_of_a_profile_is_an_error(name, tmp_path):
    call, message = WRONG[name]
    with pytest.raises(ConfigError, match=message):
        call(fake_context(0, 1), tmp_path)


def test_all_ranks_raise_if_one_cannot_begin(tmp_path):
    (tmp_path / "file").write_text("")
    paths = [tmp_path / "profile.json.gz", tmp_path / "file" / "profile.json.gz"]
    for options, message in (
        ({"ranks": (1,)}, "rank 1 cannot write .*file"),
        ({}, "rank 1 cannot write"),
    ):

        def fn(ctx, options=options, message=message):
            with (
                pytest.raises(ConfigError, match=message),
                profile(ctx, path=paths[ctx.rank], **options),
            ):
                pass

        simulate(fn, 2)


def test_ranks_of_one_process_cannot_both_be_profiled(tmp_path):
    def fn(ctx):
        with (
            pytest.raises(ConfigError, match=r"ranks 0 and 1 in one process.*\n.*ranks=\(0,\)"),
            profile(ctx, path=tmp_path / "profile.json.gz"),
        ):
            pass

    simulate(fn, 2)
