"""Hooks for exceptions, one over the other, as other libraries and later worlds put them."""

import sys

import pytest

from faccel.runtime.excepthook import ExceptHook


@pytest.fixture
def hooks():
    """The hook of the process is put back whatever a test does."""
    before, calls = sys.excepthook, []
    sys.excepthook = lambda kind, error, at: calls.append(kind)
    yield ExceptHook(), calls
    sys.excepthook = before


def chained():
    """What torch and others do: a hook that calls the one before it."""
    before = sys.excepthook
    sys.excepthook = lambda kind, error, at: before(kind, error, at)


def test_the_hook_is_given_back_with_the_last_context(hooks):
    hook, _ = hooks
    own = sys.excepthook
    hook.enter(1, 0, 1, {})
    hook.enter(2, 0, 1, {})
    hook.leave(1, None)
    assert sys.excepthook is not own
    hook.leave(2, None)
    assert sys.excepthook is own


@pytest.mark.parametrize("error", [None, ValueError()])
def test_hooks_over_hooks_never_call_each_other_in_a_circle(hooks, error):
    hook, calls = hooks
    for _ in range(3):
        hook.enter(1, 0, 1, {})
        chained()
        hook.enter(2, 0, 1, {})
        hook.leave(1, error)
        chained()
        hook.leave(2, error)
    hook.enter(3, 0, 1, {})
    sys.excepthook(ValueError, ValueError(), None)
    assert calls == [ValueError]


def test_a_single_process_says_one_line_and_goes_on(hooks, capsys):
    hook, calls = hooks
    hook.enter(1, 0, 1, {})
    sys.excepthook(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert capsys.readouterr().err == "interrupted\n"
    assert calls == []
    hook.leave(1, None)
    sys.excepthook(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert calls == [KeyboardInterrupt]
