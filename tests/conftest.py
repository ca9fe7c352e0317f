"""Settings of all tests: threads, signal handlers, and which meshes are slow."""

import gc
import logging
import os
import re
import signal

import pytest
import torch

torch.set_num_threads(1)

# The variables that faccel reads or sets. Others belong to libraries: the compiler sets some.
VARIABLES = re.compile("FACCEL_|ACCELERATE_|SLURM_|MASTER_|RANK|WORLD_SIZE|CUBLAS|CUDA_|HOME|PATH")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

# A shell starts background processes with SIGINT ignored, `nohup` those with SIGHUP. Python keeps
# that, and so would every process of a test: Ctrl-C would end none of them.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def _process_settings():
    """What every later test of this process depends on."""
    return {
        "working directory": os.getcwd(),
        "level of the root logger": logging.getLogger().level,
        "default dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "grad mode": torch.is_grad_enabled(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        **{number.name: signal.getsignal(number) for number in SIGNALS},
        **{f"${name}": text for name, text in os.environ.items() if VARIABLES.search(name)},
    }


def _restore(settings):
    os.chdir(settings["working directory"])
    for name in filter(VARIABLES.search, list(os.environ)):
        if f"${name}" not in settings:
            del os.environ[name]
    os.environ.update({name[1:]: text for name, text in settings.items() if name[0] == "$"})
    logging.getLogger().setLevel(settings["level of the root logger"])
    torch.set_default_dtype(settings["default dtype"])
    torch.set_num_threads(settings["threads"])
    torch.set_grad_enabled(settings["grad mode"])
    torch.set_float32_matmul_precision(settings["matmul precision"])
    torch.use_deterministic_algorithms(settings["deterministic algorithms"])
    for number in SIGNALS:
        signal.signal(number, settings[number.name])


@pytest.fixture(autouse=True)
def process_settings():
    """Fail for a test that leaves a setting of the process changed, and change it back."""
    before = _process_settings()
    yield
    after = _process_settings()
    if after != before:
        _restore(before)
        names = sorted(dict(before.items() ^ after.items()))
        changed = {name: (before.get(name), after.get(name)) for name in names}
        pytest.fail(f"the test changed settings of the process (before, after): {changed}")


@pytest.fixture
def log_records(caplog):
    """Return a function: the records logged so far by the loggers below `name`.

    `caplog.records` also has those of every library that logs in this process.
    """

    def records(name="faccel"):
        return [record for record in caplog.records if f"{record.name}.".startswith(f"{name}.")]

    return records


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items):
    """Mark tests on meshes of several axes as slow: their DTensors take seconds."""
    for item in items:
        callspec = getattr(item, "callspec", None)
        if callspec is not None and any(map(_is_large_mesh, callspec.params.values())):
            item.add_marker(pytest.mark.slow)


def _is_large_mesh(value):
    return isinstance(value, str) and value.count("=") > 1 and "," in value


def pytest_collection_finish():
    """Leave the objects of torch and of the collected tests out of later garbage collections."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def collected_objects():
    """Leave what earlier modules imported and cached out of garbage collections, too.

    Debug mode and the functions that run the collector go over all other objects.
    """
    gc.collect()
    gc.freeze()
