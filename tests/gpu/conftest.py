"""The device of the tests: the first GPU, or the CPU with `FACCEL_GPU_TESTS=cpu` (or `quick`)."""

import os
import pathlib

import pytest
import torch

FOLDER = pathlib.Path(__file__).parent
REASON = "needs a CUDA device; FACCEL_GPU_TESTS=cpu runs it on the CPU"


def pytest_collection_modifyitems(items):
    """Skip all tests of this folder at once, so that a summary has a line for each file."""
    if os.environ.get("FACCEL_GPU_TESTS") or torch.cuda.is_available():
        return
    for item in items:
        if FOLDER in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=REASON))


@pytest.fixture
def device():
    name = os.environ.get("FACCEL_GPU_TESTS", "cuda:0")
    return torch.device("cpu" if name == "quick" else name)


@pytest.fixture
def cuda(device):
    """The device of a test of what the CPU does not have."""
    if device.type != "cuda":
        pytest.skip("needs a CUDA device: the CPU has none of it")
    return device


@pytest.fixture
def ctx(device):
    """The context of one process on the device."""
    import faccel

    with faccel.init(env={}, device=str(device)) as context:
        yield context
