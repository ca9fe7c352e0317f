"""Everything on a pretended accelerator, which has the manners of a TPU, an Ascend NPU or a GPU.

The device is compiled from `device.cpp` once (25 s), and takes the operators of the CPU. So results
equal those on the CPU, and a tensor on a wrong device is an error, as on real hardware.
"""

import functools
import pickle
import shutil

import attrs
import pytest

from faccel.device_table import KINDS
from tests.accelerator import device, job
from tests.ranks import run_ranks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which("g++") and shutil.which("ninja")), reason="needs g++ and ninja"
    ),
]


@functools.cache
def trained_on_cpu(world_size):
    return [pickle.dumps(table) for table in run_ranks(job.train_on_cpu, world_size, device="cpu")]


CELLS = [("tpu", 2), ("npu", 2), ("musa", 2), ("tpu", 4), ("npu", 4)]


@pytest.mark.parametrize(("kind", "world_size"), CELLS)
def test_every_cell_equals_the_cpu(kind, world_size):
    before = functools.partial(device.enable, device.library_path(), kind)
    options = {"before": before, "env": job.launch_env(kind), "timeout_s": 60}
    names = run_ranks(job.run_cells, world_size, trained_on_cpu(world_size), **options)
    assert names == [list(job.cells(kind, world_size))] * world_size


@pytest.mark.parametrize("kind", ["tpu", "npu"])
def test_debug_mode_compares_the_calls_on_the_device(kind):
    before = functools.partial(device.enable, device.library_path(), kind)
    options = {"before": before, "env": job.launch_env(kind), "timeout_s": 60, "debug": True}
    # c10d still communicates by the library of the device by default.
    assert run_ranks(job.debug_cell, 2, **options) == [KINDS[kind].library] * 2


def test_the_cells_are_enough():
    assert sum(len(job.cells(kind, world_size)) for kind, world_size in CELLS) >= 60
    # An Intel GPU, whose type is in PyTorch and cannot be pretended, has the manners of an NPU.
    texts = {"hardware": "", "library": "", "package": "", "module": ""}
    assert attrs.evolve(KINDS["xpu"], **texts) == attrs.evolve(KINDS["npu"], **texts)
