"""Goodput: what a run has spent its time on, by arithmetic on a synthetic clock."""

import random

import attrs
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import faccel
from faccel.errors import ConfigError
from faccel.testing import fake_context, simulate
from faccel.tracking import goodput, init_meter, phase, rates, read_journal, tick
from tests.world.test_meters import Clock, SlowItems

CATEGORIES = (
    "useful_s",
    "startup_s",
    "data_wait_s",
    "checkpoint_s",
    "evaluation_s",
    "skipped_s",
    "lost_s",
    "down_s",
)


class SlowState:
    """Takes 7 s on the clock to save, and 4 s to load."""

    def __init__(self, clock):
        self.clock = clock

    def state_dict(self):
        self.clock.advance(7)
        return {"x": 1}

    def load_state_dict(self, state):
        self.clock.advance(4)


def kill(ctx, folder):
    """Close a context, and leave its journals as `kill -9` would."""
    paths = list((folder / "a" / "goodput").iterdir())
    contents = [path.read_bytes() for path in paths]
    ctx.lifetime.close()
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)


def step(ctx, model, opt, scaler, *, overflows):
    loss = model(torch.ones(1, 1)).sum()
    if overflows:
        loss = loss * float("inf")
    scaler = faccel.scaled_backward(loss, scaler, ctx)
    _, scaler = faccel.optimizer_step(opt, scaler, ctx, skip_nonfinite=True)
    return scaler


def run(ctx, clock, folder, *, first, last, overflow=0, saves=0, evaluates=0):
    """Train some steps: 2 s of data and 1 s of work each, but 5 s of work in the first one."""
    meter = init_meter(ctx, run="a", clock=clock)
    clock.advance(3)
    model = faccel.wrap(nn.Linear(1, 1), ctx)
    opt = faccel.wrap_optimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, ctx)
    scaler = faccel.init_scaler(ctx)
    state = {"slow": SlowState(clock)}
    if first > 1:
        faccel.load(state, folder / "checkpoints", ctx)
    dataset = SlowItems(clock)
    batches = iter(faccel.shard(DataLoader(dataset, batch_size=2), ctx).at(0))
    for number in range(first, last + 1):
        next(batches)
        clock.advance(5 if number == first else 1)
        scaler = step(ctx, model, opt, scaler, overflows=number == overflow)
        meter = tick(meter, samples=2)
        if number == saves:
            faccel.save(state, folder / "checkpoints", ctx, step=number)
        if number == evaluates:
            with phase("evaluation", ctx):
                list(faccel.shard(DataLoader(dataset, batch_size=2), ctx).at(0))
    batches.close()
    return meter


def test_the_categories_of_a_run_with_two_kills_an_overflow_and_slow_checkpoints(tmp_path):
    clock = Clock()
    config = {"run_dir": str(tmp_path)}
    ctx = fake_context(0, 1, config=config)
    run(ctx, clock, tmp_path, first=1, last=4, overflow=2, saves=3, evaluates=4)
    clock.advance(2.5)  # of a step that does not end
    kill(ctx, tmp_path)
    clock.advance(10)
    ctx = fake_context(0, 1, config=config)
    run(ctx, clock, tmp_path, first=4, last=6)
    kill(ctx, tmp_path)
    clock.advance(20)
    ctx = fake_context(0, 1, config=config)
    run(ctx, clock, tmp_path, first=4, last=7, overflow=6, saves=7)
    clock.advance(9)
    ctx.lifetime.close()

    result = goodput(read_journal(tmp_path / "a"))
    expected = {
        # steps 3 of the first process, and 5 and 7 of the last one
        "useful_s": 1 + 1 + 1,
        # before the first step, and that step, of each process; after the last step
        "startup_s": (3 + 5) * 3 + 9,
        # steps 1 to 3, and 4 to 7; step 4 of the second process is its first one
        "data_wait_s": 2 * 3 + 2 * 4,
        "checkpoint_s": 7 + 4 + 4 + 7,
        "evaluation_s": 8,
        # step 2, and step 6 of the last process
        "skipped_s": 1 + 1,
        # step 4 of the first process; 4 to 6 of the second one, of which 4 is start-up
        "lost_s": (2 + 1) + (2 + 3 + 3),
        "down_s": 2.5 + 10 + 20,
    }
    assert attrs.asdict(result) == pytest.approx(
        expected
        | {"wall_s": sum(expected.values()), "num_steps": 7, "num_skipped": 2}
        | {"num_lost": 1 + 3, "num_restarts": 2},
        abs=1e-5,
    )
    assert result.fraction == pytest.approx(3 / sum(expected.values()))


class Oracle:
    """The same figures from a list of all steps."""

    def __init__(self):
        self.steps, self.lost, self.saved = [], [], {}
        self.times = dict.fromkeys(CATEGORIES, 0.0)

    def save(self, number):
        self.saved[number] = list(self.steps)

    def resume(self, number):
        remaining = self.saved[number] if number else []
        self.lost += self.steps[len(remaining) :]
        self.steps = list(remaining)

    def result(self):
        times = dict(self.times)
        for name, seconds, data_s in self.steps:
            times[name] += seconds
            times["data_wait_s"] += data_s
        for name, seconds, data_s in self.lost:
            # the work of the first step of a process is start-up, also if it is lost
            times["startup_s" if name == "startup_s" else "lost_s"] += seconds
            times["lost_s"] += data_s
        return times


def random_process(ctx, clock, rng, oracle):
    """Train some steps with random durations, and resume from a random checkpoint."""
    meter = init_meter(ctx, run="a", clock=clock)
    resumed = rng.choice([0, *oracle.saved])
    is_first, needs_resume = True, True
    oracle.saved = {k: v for k, v in oracle.saved.items() if k <= resumed}
    if resumed:
        ctx.lifetime.note("loaded", resumed)
    number = resumed
    for _ in range(rng.randrange(6)):
        if needs_resume:
            oracle.resume(resumed)
            needs_resume = False
        data_s, work_s = rng.choice([0, 1, 2]), rng.choice([1, 3])
        ctx.lifetime.waits.data_s += data_s
        clock.advance(data_s + work_s)
        is_skipped = rng.random() < 0.3
        if is_skipped:
            ctx.lifetime.add_skip()
        meter = tick(meter)
        name = "skipped_s" if is_skipped else "useful_s"
        oracle.steps.append(("startup_s" if is_first else name, work_s, data_s))
        number, is_first = number + 1, False
        for name in ("checkpoint", "evaluation"):
            if rng.random() < 0.3:
                seconds = rng.choice([1, 5])
                with phase(name, ctx):
                    clock.advance(seconds)
                oracle.times[f"{name}_s"] += seconds
                if name == "checkpoint":
                    ctx.lifetime.note("saved", number)
                    oracle.save(number)
    return meter


@pytest.mark.parametrize("seed", range(40))
def test_random_runs_have_the_figures_of_a_list_of_all_steps(tmp_path, seed):
    rng, clock, oracle = random.Random(seed), Clock(), Oracle()
    for _ in range(rng.randrange(1, 6)):
        ctx = fake_context(0, 1, config={"run_dir": str(tmp_path)})
        random_process(ctx, clock, rng, oracle)
        end_s = clock()
        kill(ctx, tmp_path)
        clock.advance(rng.choice([0, 30]))
        oracle.times["down_s"] += clock() - end_s
    oracle.times["down_s"] -= clock() - end_s  # after the last event
    result = goodput(read_journal(tmp_path / "a"))
    expected = oracle.result()
    assert {name: getattr(result, name) for name in CATEGORIES} == pytest.approx(expected, abs=1e-4)
    assert result.wall_s == pytest.approx(sum(expected.values()), abs=1e-4)
    assert (result.num_steps, result.num_lost) == (len(oracle.steps), len(oracle.lost))


def test_a_load_after_the_last_step_loses_nothing(tmp_path):
    ctx, clock = fake_context(0, 1, config={"run_dir": str(tmp_path)}), Clock()
    run(ctx, clock, tmp_path, first=1, last=4, saves=2)
    faccel.load({"slow": SlowState(clock)}, tmp_path / "checkpoints", ctx, step=2)
    ctx.lifetime.close()
    assert goodput(read_journal(tmp_path / "a")).num_lost == 0


def test_a_rollback_inside_of_a_process_loses_the_steps_after_the_checkpoint(tmp_path):
    ctx, clock = fake_context(0, 1, config={"run_dir": str(tmp_path)}), Clock()
    meter = run(ctx, clock, tmp_path, first=1, last=4, saves=2)
    faccel.load({"slow": SlowState(clock)}, tmp_path / "checkpoints", ctx, step=2)
    for _ in range(3):
        clock.advance(1)
        meter = tick(meter)
    ctx.lifetime.close()
    result = goodput(read_journal(tmp_path / "a"))
    assert (result.num_steps, result.num_lost, result.lost_s) == (5, 2, pytest.approx(2 * 3))


def test_a_line_that_is_cut_at_any_byte_is_left_out_and_the_next_process_continues(tmp_path):
    clock = Clock()
    config = {"run_dir": str(tmp_path)}
    path = tmp_path / "a" / "goodput" / "rank-00000.jsonl"
    ctx = fake_context(0, 1, config=config)
    tick(init_meter(ctx, run="a", clock=clock))
    ctx.lifetime.close()
    content = path.read_bytes()
    num_events = len(read_journal(tmp_path / "a"))
    width = len(content) // num_events
    for size in range(len(content) - width, len(content), 7):
        path.write_bytes(content[:size])
        assert num_events - 1 <= len(read_journal(tmp_path / "a")) <= num_events
        ctx = fake_context(0, 1, config=config)
        tick(init_meter(ctx, run="a", clock=clock))
        ctx.lifetime.close()
        assert goodput(read_journal(tmp_path / "a")).num_restarts == 1


def test_a_second_meter_with_a_run_ends_the_journal_of_the_first_one(tmp_path):
    ctx, clock = fake_context(0, 1, config={"run_dir": str(tmp_path)}), Clock()
    for run_name, num_steps in (("a", 2), ("a", 3), ("b", 4)):
        meter = init_meter(ctx, run=run_name, clock=clock)
        for _ in range(num_steps):
            clock.advance(1)
            meter = tick(meter)
        ctx.lifetime.note("saved", num_steps)
    ctx.lifetime.close()
    events = read_journal(tmp_path / "a")
    result = goodput(events)
    assert (result.num_restarts, result.num_steps, result.num_lost) == (1, 3, 2)
    assert sum(event["event"] == "saved" for event in events) == 2
    assert goodput(read_journal(tmp_path / "b")).wall_s == 4


def test_lines_of_another_program_are_left_out(tmp_path):
    ctx, clock = fake_context(0, 1, config={"run_dir": str(tmp_path)}), Clock()
    tick(init_meter(ctx, run="a", clock=clock))
    ctx.lifetime.close()
    path = tmp_path / "a" / "goodput" / "rank-00000.jsonl"
    expected = goodput(read_journal(tmp_path / "a"))
    lines = [b"", b"3", b"[]", b"{}", b'{"event": "step"}', b'{"event": []}', b"\xff", b'{"event"']
    line = path.read_bytes().splitlines()[1]
    lines += [line.replace(b'"time": ', b'"time": "x", "y": '), line.replace(b'"step"', b'"stop"')]
    path.write_bytes(path.read_bytes() + b"\n".join(lines))
    assert goodput(read_journal(tmp_path / "a")) == expected


def test_a_process_that_has_lost_the_beginning_of_its_journal_does_not_count(tmp_path):
    config, clock = {"run_dir": str(tmp_path)}, Clock()
    path = tmp_path / "a" / "goodput" / "rank-00000.jsonl"
    for num_steps in (2, 3):
        ctx = fake_context(0, 1, config=config)
        meter = init_meter(ctx, run="a", clock=clock)
        for _ in range(num_steps):
            clock.advance(1)
            meter = tick(meter)
        ctx.lifetime.close()
        if num_steps == 2:  # the first block of a file after a power failure
            path.write_bytes(path.read_bytes().replace(b'"start"', b"\0" * 7))
    result = goodput(read_journal(tmp_path / "a"))
    assert (result.wall_s, result.num_steps, result.num_restarts) == (3, 3, 0)


def test_a_journal_does_not_grow_with_the_number_of_steps(tmp_path):
    ctx, clock = fake_context(0, 1, config={"run_dir": str(tmp_path)}), Clock()
    meter = init_meter(ctx, run="a", clock=clock)
    (path,) = (tmp_path / "a" / "goodput").iterdir()
    sizes = set()
    for _ in range(300):
        clock.advance(1)
        meter = tick(meter)
        sizes.add(path.stat().st_size)
    assert len(sizes) == 1
    assert goodput(read_journal(tmp_path / "a")).num_steps == 300  # while the run trains
    ctx.lifetime.close()


def test_each_rank_has_its_journal(tmp_path):
    def fn(ctx):
        clock = Clock()
        meter = init_meter(ctx, run="a", clock=clock)
        for _ in range(2):
            clock.advance(1 + ctx.rank)
            meter = tick(meter)

    simulate(fn, 3, config={"run_dir": str(tmp_path)})
    events = read_journal(tmp_path / "a")
    assert [goodput(events, rank=rank).wall_s for rank in range(3)] == [2, 4, 6]
    with pytest.raises(ConfigError, match="`events` has none of this rank"):
        goodput(events, rank=3)


def test_a_full_disk_is_reported_once_and_training_continues(tmp_path, log_records):
    path = tmp_path / "a" / "goodput" / "rank-00000.jsonl"
    path.parent.mkdir(parents=True)
    path.symlink_to("/dev/full")
    ctx, clock = fake_context(0, 1, config={"run_dir": str(tmp_path)}), Clock()
    meter = init_meter(ctx, run="a", warmup=0, clock=clock)
    for _ in range(3):
        clock.advance(1)
        meter = tick(meter, samples=1)
    ctx.lifetime.close()
    assert rates(meter, ctx).samples_s == 1
    (record,) = log_records()
    assert "No space left" in record.getMessage()


def test_phases_are_left_out_of_rates(tmp_path):
    ctx, clock = fake_context(0, 1), Clock()
    loader = faccel.shard(DataLoader(SlowItems(clock), batch_size=2), ctx).at(0)
    meter = init_meter(ctx, warmup=0, clock=clock)
    for _ in loader:
        clock.advance(2)
        meter = tick(meter, samples=8)
        with phase("evaluation", ctx):
            list(loader)
            faccel.save({"slow": SlowState(clock)}, tmp_path, ctx, step=meter.num_steps)
    result = rates(meter, ctx)
    assert (result.samples_s, result.data_wait) == (2, 0.5)
    assert ctx.lifetime.waits.phase_s == {"checkpoint": 0, "evaluation": 4 * (8 + 7)}


def test_an_exception_ends_a_phase():
    ctx, clock = fake_context(0, 1), Clock()
    init_meter(ctx, clock=clock)
    for _ in range(2):
        with pytest.raises(KeyError), phase("evaluation", ctx):
            clock.advance(3)
            raise KeyError
    assert ctx.lifetime.waits.phase_s["evaluation"] == 6


WRONG = {
    "a phase": (lambda ctx: phase("eval", ctx), "`name` must be one of"),
    "swapped": (lambda ctx: phase(ctx, "evaluation"), "write `with faccel.tracking.phase"),
    "no journal": (lambda ctx: read_journal(ctx.config.run_dir), "has no journal"),
    "a URL": (lambda ctx: init_meter(ctx, run="s3://bucket/run"), "`run` must be a local path"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_of_a_journal_is_an_error(name, tmp_path):
    call, message = WRONG[name]
    with pytest.raises(ConfigError, match=message):
        call(fake_context(0, 1, config={"run_dir": str(tmp_path)}))


def test_a_run_dir_in_which_no_journal_can_be_created_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    ctx = fake_context(0, 1, config={"run_dir": str(tmp_path / "file")})
    with pytest.raises(ConfigError, match="the journal of the run cannot be created"):
        init_meter(ctx, run="a")
    assert ctx.lifetime.callbacks(object) == []


def test_a_script_without_a_meter_opens_nothing_and_counts_nothing(tmp_path):
    ctx = fake_context(0, 1, config={"run_dir": str(tmp_path / "runs")})
    with phase("evaluation", ctx):
        faccel.save({"x": 1}, tmp_path / "checkpoints", ctx, step=1)
    assert ctx.lifetime.waits is None
    assert not (tmp_path / "runs").exists()
