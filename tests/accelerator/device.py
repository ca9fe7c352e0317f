"""A pretended accelerator: the C++ file beside this one, with the manners of a real device type.

`library_path()` compiles it once and keeps it in the user's cache folder. `enable(path, kind)`
makes it the accelerator of this process, under the name of the kind.
"""

import fcntl
import hashlib
import importlib.machinery
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import types

import torch
import torch.distributed as dist

from faccel.device_table import KINDS

HERE = pathlib.Path(__file__).parent
SOURCE = HERE / "device.cpp"
NUM_DEVICES = 4
_COMPILE = """
import sys, torch.utils.cpp_extension as cpp
cpp.load("fakedev", [sys.argv[1]], build_directory=sys.argv[2], is_python_module=False,
         extra_cflags=["-O0", "-DUSE_DISTRIBUTED", "-DUSE_C10D_GLOO"])
"""


def library_path():
    """Return the compiled library; compile it if the cache has none for this source and torch."""
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    cache /= "faccel-tests"
    cache.mkdir(parents=True, exist_ok=True)
    key = SOURCE.read_bytes() + f"{torch.__version__} {sys.version}".encode()
    path = cache / f"accelerator-{hashlib.sha256(key).hexdigest()[:16]}.so"
    # Two workers of pytest may ask at once. The system releases the lock of a killed one.
    with open(cache / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, "-c", _COMPILE, str(SOURCE), folder]
                subprocess.run(command, check=True)
                built = next(pathlib.Path(folder).glob("fakedev*.so"))
                copy = path.with_suffix(".new")
                copy.write_bytes(built.read_bytes())
                copy.rename(path)
    return str(path)


def _load(path):
    loader = importlib.machinery.ExtensionFileLoader("fakedev", path)
    spec = importlib.util.spec_from_file_location("fakedev", path, loader=loader)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _refusing(name, function):
    """Return a function that only PyTorch may call, as TorchTPU has them."""

    def call(*args, **kwargs):
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller != "torch" and not caller.startswith("torch."):
            raise RuntimeError(
                f"{name} is internal to TorchTPU. Use torch.accelerator.{name} instead"
            )
        return function(*args, **kwargs)

    return call


def _module(library, kind, generators):
    """Return the module `torch.<kind>`, which plugins write in Python."""
    is_bound = KINDS[kind].is_process_bound

    def index_of(device):
        index = device if isinstance(device, int | None) else torch.device(device).index
        return library.current() if index is None else index

    def set_device(device):
        if is_bound and index_of(device) != library.current():
            raise ValueError(f"the process is bound to device {library.current()}")
        library.set_current(index_of(device))

    functions = {
        "is_available": lambda: library.count() > 0,
        "device_count": library.count,
        "current_device": library.current,
        "set_device": set_device,
        "synchronize": lambda device=None: torch.accelerator.synchronize(),
        "current_stream": lambda device=None: torch.accelerator.current_stream(),
        "initial_seed": lambda: generators[library.current()].initial_seed(),
        "get_rng_state": lambda device=kind: generators[index_of(device)].get_state(),
    }
    if is_bound:  # as TorchTPU refuses them
        functions = {name: _refusing(name, function) for name, function in functions.items()}
    properties = types.SimpleNamespace(name=f"pretended {kind}", total_memory=16 << 30)
    functions |= {
        "default_generators": generators,
        "set_rng_state": lambda state, device=kind: generators[index_of(device)].set_state(state),
        "manual_seed": lambda seed: generators[library.current()].manual_seed(seed),
        "manual_seed_all": lambda seed: [each.manual_seed(seed) for each in generators],
        "get_device_properties": lambda device=None: properties,
        "is_initialized": lambda: True,
        "get_amp_supported_dtype": lambda: [torch.bfloat16, torch.float16, torch.float32],
        "Stream": lambda device=None, priority=0: torch.Stream(
            torch.device(kind, library.current())
        ),
        "Event": lambda *args, **kwargs: torch.Event(torch.device(kind, library.current())),
        "stream": lambda stream: stream,
        "device": lambda index: torch.accelerator.device_index(index),
        "num_late": library.num_late,
        "_is_in_bad_fork": lambda: False,
        "_lazy_init": lambda: None,
    }
    if kind == "tpu":
        distributed = types.SimpleNamespace(set_tpu_launch_env=_set_tpu_launch_env)
        functions["distributed"] = distributed
    module = types.ModuleType(f"torch.{kind}")
    for name, function in functions.items():
        setattr(module, name, function)
    return module


def _set_tpu_launch_env(*, nnodes=None, nproc_per_node=None):
    """What TorchTPU's function of this name does on one host of four chips."""
    if nproc_per_node not in (1, 2, 4):
        raise RuntimeError(f"No TPU topology found for count: {nproc_per_node}")
    addresses = ",".join(f"localhost:{8070 + i}" for i in range(nproc_per_node))
    os.environ.setdefault("TORCH_TPU_SLICEBUILDER_ADDRESSES", addresses)
    os.environ.setdefault("TORCH_TPU_TOPOLOGY", "2,2,1")


def plugin_folder(folder, path, kind):
    """Write a package into a folder that makes PyTorch load the device, as an installed one does.

    Every process whose PYTHONPATH has the folder then has the device.
    """
    info = folder / "pretended-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: pretended\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[torch.backends]\npretended = pretended:load\n")
    (folder / "pretended.py").write_text(
        "def load():\n"
        "    from tests.accelerator import device\n"
        f"    device.enable({path!r}, {kind!r})\n"
    )
    (folder / "torch_tpu.py").write_text("")  # only its name is looked up
    return str(folder)


def enable(path, kind):
    """Make the pretended device the accelerator of this process, with the manners of `kind`."""
    library = _load(path)
    torch.utils.rename_privateuse1_backend(kind)
    library.register_hooks()
    library.set_count(NUM_DEVICES)
    library.set_float64(KINDS[kind].has_float64)
    generators = tuple(library.default_generator(index) for index in range(NUM_DEVICES))
    module = _module(library, kind, generators)
    torch._register_device_module(kind, module)
    sys.modules[f"torch.{kind}"] = module
    torch.utils.generate_methods_for_privateuse1_backend()
    # c10d's `reduce` is missing in TorchTPU.
    has_reduce = kind != "tpu"

    def create(store, rank, size, timeout):
        gloo = dist.ProcessGroupGloo(store, rank, size, timeout)
        return library.alias(gloo, KINDS[kind].library, has_reduce)

    dist.Backend.register_backend(KINDS[kind].library, create, devices=[kind])
    if kind == "tpu":
        library.only(json.loads((HERE / "tpu_ops.json").read_text()))
    return library
