"""Settings of all tests: threads, signal handlers, and which meshes are slow."""

import signal

import pytest
import torch

torch.set_num_threads(1)

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

# A shell starts background processes with SIGINT ignored. Python keeps that, and so would every
# process of a test: Ctrl-C would end none of them.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def signal_handlers():
    """Fail for a test that leaves a handler: later tests would not receive their signals."""
    before = [signal.getsignal(number) for number in SIGNALS]
    yield
    after = [signal.getsignal(number) for number in SIGNALS]
    for number, handler in zip(SIGNALS, before, strict=True):
        signal.signal(number, handler)
    assert after == before


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items):
    """Mark tests on meshes of several axes as slow: their DTensors take seconds."""
    for item in items:
        callspec = getattr(item, "callspec", None)
        if callspec is not None and any(map(_is_large_mesh, callspec.params.values())):
            item.add_marker(pytest.mark.slow)


def _is_large_mesh(value):
    return isinstance(value, str) and value.count("=") > 1 and "," in value
