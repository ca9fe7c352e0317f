"""Settings of all tests: one thread per process, and no signal handler stays after a test."""

import signal

import pytest
import torch

torch.set_num_threads(1)

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@pytest.fixture(autouse=True)
def signal_handlers():
    """Fail for a test that leaves a handler: later tests would not receive their signals."""
    before = [signal.getsignal(number) for number in SIGNALS]
    yield
    after = [signal.getsignal(number) for number in SIGNALS]
    for number, handler in zip(SIGNALS, before, strict=True):
        signal.signal(number, handler)
    assert after == before
