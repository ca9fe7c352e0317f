"""Settings of all tests: one thread per process, and no signal handler stays after a test."""

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
