"""Mutated checkpoints are loaded, or refused by an error of faccel, and nothing else happens.

To try more, set the number and another seed:
`FUZZ_CHECKPOINTS=10000 FUZZ_SEED=1 python -m pytest -n 0 -s tests/world/test_fuzzed_checkpoints.py`
"""

import os
import random
import shutil
import sys
import traceback
import warnings
from collections import Counter

import pytest
import torch

import faccel
from faccel.checkpoint.merge import merge
from faccel.errors import FaccelError
from faccel.testing import fake_context, simulate
from tests.golden.test_checkpoint_format import build
from tests.mutations import mutate

ONE = fake_context(0, 1)
NUM_MUTATIONS = int(os.environ.get("FUZZ_CHECKPOINTS", "100"))
SEED = os.environ.get("FUZZ_SEED", "0")
# Events of `sys.addaudithook`: code is executed, and files change.
EXECUTING = (
    "exec", "compile", "import", "marshal.loads", "pickle.find_class", "subprocess.Popen",
    "os.system", "os.exec", "os.posix_spawn", "os.fork", "ctypes.dlopen", "socket.connect",
)  # fmt: skip
WRITING = (
    "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate",
    "os.chmod", "os.chown", "os.utime", "os.setxattr", "shutil.rmtree", "shutil.move",
)  # fmt: skip


class Recorder:
    """Records the events of calls. An audit hook stays until the process ends."""

    def __init__(self):
        self.events = None

    def __call__(self, event, arguments):
        if self.events is None:
            return
        # ranks exchange records of faccel
        is_exchange = event == "pickle.find_class" and arguments[0].startswith("faccel.")
        is_write = event == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_ACCMODE
        if (event in EXECUTING and not is_exchange) or event in WRITING or is_write:
            self.events.append(f"{event} {arguments!r}"[:200])

    def call(self, fn, *arguments, **options):
        """Call `fn`; return its exception, if any, and the events."""
        error, self.events = None, []
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                fn(*arguments, **options)
        except BaseException as caught:
            error = caught
        events, self.events = self.events, None
        return error, events


RECORDER = Recorder()
sys.addaudithook(RECORDER)


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
    ema = faccel.init_ema(state["model"], ctx)
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
    """Return another function that reads the folder, with its arguments."""
    name = draw.choice(("checkpoints", "latest", "merge", "save"))
    if name == "checkpoints":
        return faccel.checkpoint.checkpoints, path
    if name == "latest":
        return faccel.latest, path, ONE
    if name == "merge":
        return lambda: merge(str(path), f"{path}-export", ONE, name="model"), *()
    return (lambda: faccel.save({}, path, ONE, step=2, overwrite=True)), *()


def not_from_faccel(*errors):
    return [
        "".join(traceback.format_exception(error))
        for error in errors
        if error is not None and not isinstance(error, FaccelError)
    ]


def test_mutated_checkpoints_are_loaded_or_refused_and_change_nothing_else(saved, tmp_path):
    outside, runs = tmp_path / "outside.txt", tmp_path / "runs"
    outside.write_text("outside")
    state = build(ONE, 0)
    before = contents(state)
    load_on_both(os.path.dirname(saved))  # imports what it needs
    merge(os.path.dirname(saved), str(tmp_path / "first"), ONE, name="model")
    counts, failures = Counter(mutations=NUM_MUTATIONS), []
    for number in range(NUM_MUTATIONS):
        draw = random.Random(f"{SEED} {number}")
        folder = runs / "step-000000003"
        shutil.copytree(saved, folder)
        names = mutate(folder, draw)
        if number % 20 == 0:
            error, _ = RECORDER.call(load_on_both, str(runs))
            failures += [(number, names, text) for text in not_from_faccel(error)]
        error, events = RECORDER.call(faccel.load, state, runs, ONE)
        other_error, other_events = RECORDER.call(*other_call(runs, draw))
        # `save` and `merge` write, and `save` exchanges the plans of the ranks
        events += [event for event in other_events if event.startswith(("exec", "import", "sub"))]
        problems = {
            "exceptions of others": not_from_faccel(error, other_error),
            "executed or written": events,
            "half written": [error] if error is not None and contents(state) != before else [],
            "outside": [folder] if outside.read_text() != "outside" else [],
        }
        counts["loaded" if error is None else "refused"] += 1
        for kind, found in problems.items():
            counts[kind] += len(found)
            failures += [(number, names, kind, problem) for problem in found]
        if contents(state) != before:
            state = build(ONE, 0)
            assert contents(state) == before
        for path in tmp_path.glob("runs*"):
            shutil.rmtree(path)
    print("\ncheckpoints:", dict(counts))
    assert not failures, "\n".join(" ".join(map(str, failure)) for failure in failures[:5])
