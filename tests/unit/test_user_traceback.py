"""The traceback of an error of faccel ends at the user's call."""

import contextlib
import gc
import pathlib
import sys
import traceback

import pytest
import torch

import faccel
from faccel.errors import FaccelError
from faccel.runtime.excepthook import ExceptHook
from faccel.runtime.user_traceback import hide_frames

PACKAGE = str(pathlib.Path(faccel.__file__).parent)


class Broken:
    """Raises where `save` calls it."""

    def state_dict(self):
        raise KeyError("no state")

    def load_state_dict(self, state):
        pass


CALLS = {
    "gather": lambda ctx, path: faccel.gather({"a": "text"}, ctx),
    "save": lambda ctx, path: faccel.save({"a": object()}, path, ctx, step=1),
    "load": lambda ctx, path: faccel.load({}, path / "missing", ctx),
    "wrap": lambda ctx, path: faccel.wrap(3, ctx),
    "mesh": lambda ctx, path: faccel.MeshSpec(tp=-2),
    "init": lambda ctx, path: faccel.init(env={}, seed="text"),
    "a call of the user's code": lambda ctx, path: faccel.save({"a": Broken()}, path, ctx, step=1),
    "launch": lambda ctx, path: faccel.launch(3, num_processes=2),
}


@pytest.fixture
def printed():
    """The traceback of each error that `sys.excepthook` prints."""
    previous, texts = sys.excepthook, []
    sys.excepthook = lambda error_type, error, tb: texts.append(
        "".join(traceback.format_exception(error_type, error, tb))
    )
    yield texts
    sys.excepthook = previous


@pytest.fixture(scope="module")
def ctx():
    with faccel.init(env={}) as ctx:
        yield ctx


def error_of(call, ctx, path):
    try:
        CALLS[call](ctx, path)
    except FaccelError as error:
        return error
    raise AssertionError(f"{call} raises nothing")


@pytest.mark.parametrize("call", CALLS)
def test_the_last_frame_is_the_call_and_none_is_inside_of_faccel(call, ctx, printed, tmp_path):
    error = error_of(call, ctx, tmp_path)
    hook = ExceptHook()
    hook.install(1, 0, 1, {})
    sys.excepthook(type(error), error, error.__traceback__)
    hook.uninstall(1, None)
    assert PACKAGE not in printed[0], printed[0]
    assert "<attrs" not in printed[0], printed[0]
    frames = traceback.extract_tb(error.__traceback__)
    assert [frame.filename for frame in frames] == [__file__] * 2
    assert f"{type(error).__name__}: {error}" in printed[0]


def test_functions_of_the_user_that_faccel_calls_keep_their_frames(ctx, tmp_path):
    error = error_of("a call of the user's code", ctx, tmp_path)
    hide_frames(error)
    frames = traceback.extract_tb(error.__cause__.__traceback__)
    assert [frame.name for frame in frames] == ["state_dict"]


def test_debug_mode_prints_all_frames(ctx, printed, tmp_path):
    error = error_of("gather", ctx, tmp_path)
    hook = ExceptHook()
    hook.install(1, 0, 1, {}, shows_frames=True)
    sys.excepthook(type(error), error, error.__traceback__)
    hook.uninstall(1, None)
    assert PACKAGE in printed[0]


def test_other_errors_keep_all_frames(ctx):
    with pytest.raises(RuntimeError) as caught:
        faccel.wrap(torch.nn.Linear(2, 2), ctx)(torch.ones(3))
    before = traceback.extract_tb(caught.value.__traceback__)
    hide_frames(caught.value)
    assert traceback.extract_tb(caught.value.__traceback__) == before
    assert any(frame.filename.startswith(PACKAGE) for frame in before)


@pytest.mark.parametrize("call", ["init", "launch"])
@pytest.mark.parametrize("debug", ["", "1"])
def test_an_error_outside_of_a_context_replaces_the_hook_while_it_exists(
    call, debug, printed, tmp_path, monkeypatch
):
    monkeypatch.setenv("FACCEL_DEBUG", debug)
    env = {"FACCEL_DEBUG": debug}
    calls = {
        "init": lambda: faccel.init(env=env, seed="text"),
        "launch": lambda: faccel.launch(3, num_processes=2),
    }
    previous = sys.excepthook
    with contextlib.suppress(FaccelError):
        calls[call]()
    gc.collect()
    assert sys.excepthook is previous
    try:
        calls[call]()
    except FaccelError as error:
        sys.excepthook(type(error), error, error.__traceback__)
        other = ValueError()
        sys.excepthook(ValueError, other, None)
    assert (PACKAGE in printed[0]) is bool(debug), printed[0]
    assert printed[1] == "ValueError\n"
    gc.collect()
    assert sys.excepthook is previous
