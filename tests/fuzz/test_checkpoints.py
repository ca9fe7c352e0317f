"""Mutated checkpoints are loaded, or refused by an error of faccel, and nothing else happens."""

import os
import shutil

import pytest
import torch

import faccel
from faccel.checkpoint.merge import merge
from faccel.errors import FaccelError
from faccel.testing import fake_context, simulate
from tests.fuzz.mutations import mutate
from tests.fuzz.runs import EXECUTING, Report, audited, cases
from tests.golden.test_checkpoint_format import build

ONE = fake_context(0, 1)


def content(value):
    """Return a value that is equal only for states with equal bits."""
    if isinstance(value, torch.Tensor):
        raw = value.detach().contiguous().reshape(-1).view(torch.uint8)
        return str(value.dtype), tuple(value.shape), bytes(raw.tolist())
    if isinstance(value, dict):
        return {str(key): content(child) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [content(child) for child in value]
    return repr(value)


def contents(state):
    """Return the content of the objects that `load` updates in place."""
    objects = {name: dict(state[name].state_dict()) for name in ("model", "sharded", "opt")}
    schedule = {key: value for key, value in vars(state["schedule"]).items() if key != "optimizer"}
    return content(objects | {"schedule": schedule, "counted": state["counted"].count})


def full_state(ctx, value):
    """Return a state with every kind of value."""
    state = build(ctx, value)
    ema = faccel.parallel.init_ema(state["model"], ctx)
    return state | {"ema": ema, "own": faccel.checkpoint.per_rank([value, torch.ones(2)])}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return the folder of a checkpoint with two files; a sharded tensor is in both."""
    path = tmp_path_factory.mktemp("saved")

    def save(ctx):
        return faccel.save(full_state(ctx, 3), path, ctx, step=3).path

    return simulate(save, 2)[0]


def load_on_both(path):
    """Load on two ranks, of which each has a value marked with `per_rank`."""
    simulate(lambda ctx: faccel.load(full_state(ctx, 0), path, ctx), 2)


def other_call(path, draw):
    """Return another call that reads the folder."""
    calls = {
        "checkpoints": lambda: faccel.checkpoint.checkpoints(path),
        "latest": lambda: faccel.latest(path, ONE),
        "merge": lambda: merge(str(path), f"{path}-export", ONE, name="model"),
        "save": lambda: faccel.save({}, path, ONE, step=2, overwrite=True),
    }
    return calls[draw.choice(sorted(calls))]


def executed(events):
    """Return the events that execute code, without the records that ranks exchange."""
    return [
        (event, arguments)
        for event, arguments in events
        if event in EXECUTING and event != "pickle.find_class"
    ]


def check_untouched(report, label, folder, error, events):
    """Check what a `load` has caused: no events, and an error of faccel if any."""
    for event, arguments in events:
        # ranks exchange records of faccel
        if event != "pickle.find_class" or not arguments[0].startswith("faccel."):
            report.fail(label, f"{folder}: the event {event} {arguments!r}")
    check_error(report, label, folder, error)


def check_error(report, label, folder, error):
    if error is not None and not isinstance(error, FaccelError):
        report.fail(label, f"{folder}: an exception that is not of faccel", error)


def test_a_mutated_checkpoint_is_loaded_or_refused_and_nothing_else_happens(saved, tmp_path):
    outside, runs = tmp_path / "outside.txt", tmp_path / "runs"
    outside.write_text("outside")
    state = build(ONE, 0)
    before = contents(state)
    load_on_both(os.path.dirname(saved))  # imports what it needs
    merge(os.path.dirname(saved), str(tmp_path / "first"), ONE, name="model")
    report = Report("checkpoints")
    for number, (label, draw) in enumerate(cases("checkpoints", 100)):
        folder = runs / "step-000000003"
        shutil.copytree(saved, folder)
        names = mutate(folder, draw)
        if number % 20 == 0:
            check_error(report, label, names, audited(lambda: load_on_both(str(runs)))[1])
        _, error, events = audited(lambda loaded=state: faccel.load(loaded, runs, ONE))
        report.count("loaded" if error is None else "refused")
        check_untouched(report, label, names, error, events)
        if contents(state) != before:
            if error is not None:
                report.fail(label, f"{names}: the state is half written", error)
            state = build(ONE, 0)
            assert contents(state) == before
        _, error, events = audited(other_call(runs, draw))
        check_error(report, label, names, error)
        for event in executed(events):
            report.fail(label, f"{names}: the event {event}")
        if outside.read_text() != "outside" or len(list(tmp_path.iterdir())) > 5:
            report.fail(label, f"{names}: written outside")
        for path in tmp_path.glob("runs*"):
            shutil.rmtree(path)
    report.finish()
