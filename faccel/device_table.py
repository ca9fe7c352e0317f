"""The table of device types: what distinguishes each of them from CUDA.

Every device type follows one rule: `torch.accelerator.current_accelerator()` names it, it
communicates with the c10d backend that was registered for it, each local rank has the device of its
number, and random numbers come from `torch.get_device_module(device).default_generators`. A row
lists only the differences, so a type without a row behaves like CUDA.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
import sys
import warnings
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import MappingProxyType
from typing import Any

import attrs
import torch


@attrs.frozen
class DeviceKind:
    """A row of the table. The defaults are CUDA's properties.

    Args:
        hardware: The usual name of the hardware, for the documentation.
        is_host: Whether tensors are in the memory of the host, so that reading them does not wait.
        is_process_bound: Whether each process sees one device, its own, under the number 0.
        has_pinned_memory: Whether copies from pinned memory of the host overlap with computation.
        can_fork: Whether a forked process can use the device if its parent did not.
        has_fp16_unscale: Whether the kernel of torch's `GradScaler` exists.
        has_float64: Whether tensors of float64 can be computed and reduced.
        has_bf16: Whether all devices of the type compute in bfloat16. Of others PyTorch is asked.
        library: The c10d backend, for the documentation; `init` uses the one that c10d registered.
        package: The Python package that adds the type to PyTorch; "" if PyTorch has it.
        module: The name under which that package is imported.
        launch_variable: A variable of the environment that a launcher must set for several
            processes; "" if there is none.
        fp8_capability: The compute capability from which a device multiplies in fp8; None where
            PyTorch has no such product.
        fp8_rowwise_capability: The same, with one scale for each row.
        mxfp8_capability: The same, with one scale for each 32 elements.
        kubernetes_resource: The resource of the device plugin that pods request; "" if it depends
            on the model.
        ray_resource: The resource by which Ray assigns a device to an actor; "" if faccel starts
            no ranks on it there.
    """

    hardware: str = ""
    is_host: bool = False
    is_process_bound: bool = False
    has_pinned_memory: bool = True
    can_fork: bool = True
    has_fp16_unscale: bool = True
    has_float64: bool = True
    has_bf16: bool = False
    library: str = ""
    package: str = ""
    module: str = ""
    launch_variable: str = ""
    # Not CUDA's: a type without a row is not known to multiply in fp8.
    fp8_capability: tuple[int, int] | None = None
    fp8_rowwise_capability: tuple[int, int] | None = None
    mxfp8_capability: tuple[int, int] | None = None
    kubernetes_resource: str = ""
    # Not CUDA's: each type has a variable of its kind that limits a process to some devices.
    ray_resource: str = ""


KINDS: Mapping[str, DeviceKind] = MappingProxyType(
    {
        "cpu": DeviceKind("any CPU", is_host=True, has_pinned_memory=False, library="gloo"),
        # fp8 from Ada and Hopper, the devices on which torchao tests its recipes.
        "cuda": DeviceKind(
            "NVIDIA GPUs, AMD GPUs (ROCm)",
            library="nccl",
            fp8_capability=(8, 9),
            fp8_rowwise_capability=(9, 0),
            mxfp8_capability=(10, 0),
            kubernetes_resource="nvidia.com/gpu",
            ray_resource="GPU",
        ),
        # Arc cards have no float64.
        "xpu": DeviceKind("Intel GPUs", has_float64=False, library="xccl"),
        "mps": DeviceKind(
            "Apple GPUs",
            is_process_bound=True,
            has_pinned_memory=False,
            can_fork=False,
            has_float64=False,
        ),
        # A process claims one chip. XLA emulates float64, and its reductions are untested upstream.
        "tpu": DeviceKind(
            "Google TPU v4 and newer",
            is_process_bound=True,
            has_fp16_unscale=False,
            has_float64=False,
            has_bf16=True,
            library="tpu_dist",
            package="torch-tpu",
            module="torch_tpu",
            launch_variable="TORCH_TPU_SLICEBUILDER_ADDRESSES",
        ),
        "npu": DeviceKind(
            "Huawei Ascend",
            has_float64=False,
            library="hccl",
            package="torch-npu",
            module="torch_npu",
        ),
        # A process claims one of the modules of its node.
        "hpu": DeviceKind(
            "Intel Gaudi",
            is_process_bound=True,
            has_float64=False,
            library="hccl",
            package="habana-torch-plugin",
            module="habana_frameworks",
        ),
        "mlu": DeviceKind(
            "Cambricon MLU",
            has_float64=False,
            library="cncl",
            package="torch-mlu",
            module="torch_mlu",
        ),
        "musa": DeviceKind(
            "Moore Threads GPUs", library="mccl", package="torch-musa", module="torch_musa"
        ),
        # 64-bit types are computed in 32 bits there.
        "neuron": DeviceKind(
            "AWS Trainium 2 and 3",
            has_pinned_memory=False,
            has_fp16_unscale=False,
            has_float64=False,
            library="neuron",
            package="torch-neuronx",
            module="torch_neuronx",
        ),
        "rbln": DeviceKind(
            "Rebellions NPUs",
            has_pinned_memory=False,
            has_fp16_unscale=False,
            has_float64=False,
            library="rbln-ccl",
            package="torch-rbln",
            module="torch_rbln",
        ),
    }
)
"""Device type to its row. It is the only place that distinguishes device types."""

_LIKE_CUDA = DeviceKind()


def kind_of(device: torch.device) -> DeviceKind:
    """Return the row of a device.

    Effects: pure.

    Examples:
        >>> kind_of(torch.device("mps", 0)).is_process_bound
        True
    """
    return KINDS.get(device.type, _LIKE_CUDA)


def is_host(device: torch.device) -> bool:
    """Return whether tensors of a device are in the memory of the host.

    Effects: pure.

    Examples:
        >>> is_host(torch.device("cpu")), is_host(torch.device("cuda"))
        (True, False)
    """
    return kind_of(device).is_host


def widest_dtype(device: torch.device) -> torch.dtype:
    """Return the floating point type with the most bits that a device computes in.

    Effects: pure.

    Examples:
        >>> widest_dtype(torch.device("cpu")), widest_dtype(torch.device("mps"))
        (torch.float64, torch.float32)
    """
    if kind_of(device).has_float64:
        return torch.float64
    return torch.float32


@contextmanager
def without_stage_warnings() -> Generator[None]:
    """Run the body without TorchTPU's warnings that an API is experimental.

    They would end a program that runs with `-W error`, and users cannot act on them.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="<TorchTpu/ApiStage/")
        yield


@functools.cache
def default_generator(device: torch.device) -> torch.Generator:
    """Return the generator from which layers on a device draw by default.

    Effects: ambient. The device must be initialized, as `faccel.init` does.

    Examples:
        >>> default_generator(torch.device("cpu")) is torch.default_generator
        True
    """
    if is_host(device):
        return torch.default_generator
    module: Any = torch.get_device_module(device)
    with without_stage_warnings():
        # mps has one generator, and Gaudi keeps them in the module `random`.
        if hasattr(module, "_get_default_mps_generator"):
            return module._get_default_mps_generator()
        if not hasattr(module, "default_generators"):
            module = module.random
        return module.default_generators[device.index or 0]


def empty_cache(device: torch.device) -> None:
    """Return memory that PyTorch keeps for later tensors to the device.

    Effects: ambient. Does nothing on the host, and on devices without such a cache.

    Examples:
        >>> empty_cache(torch.device("cpu"))
    """
    if is_host(device):
        return
    module: Any = torch.get_device_module(device)
    # Not `torch.accelerator.empty_cache`, which raises for a device that registers no allocator.
    if hasattr(module, "empty_cache"):
        with without_stage_warnings():
            module.empty_cache()


def model_name(device: torch.device) -> str:
    """Return the name of the hardware that PyTorch reports; "" if it reports none.

    Effects: ambient. Asks PyTorch.

    Examples:
        >>> model_name(torch.device("cpu"))
        ''
    """
    if is_host(device):
        return ""
    module: Any = torch.get_device_module(device)
    with without_stage_warnings():
        if hasattr(module, "get_device_name"):
            return str(module.get_device_name(device))
        if hasattr(module, "get_device_properties"):
            return str(getattr(module.get_device_properties(device), "name", ""))
    return ""


def peak_bytes(device: torch.device) -> int | None:
    """Return the most memory that tensors of this process had on a device at one time.

    Effects: ambient. Reads a counter of the allocator, without waiting for the device.

    Returns:
        On the host the largest resident size of the process, which includes the interpreter. None
        where neither is known.

    Examples:
        >>> peak_bytes(torch.device("cpu")) > 2**20
        True
    """
    if is_host(device):
        return _peak_of_process()
    module: Any = torch.get_device_module(device)
    if not hasattr(module, "max_memory_allocated"):
        return None
    with without_stage_warnings():
        return int(module.max_memory_allocated(device))


def _peak_of_process() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.platform == "darwin":  # in bytes there, in KiB elsewhere
        return peak
    return peak * 1024


def is_initialized(device_type: str) -> bool:
    """Return whether this process has used a device, so that a fork could not use it.

    Effects: ambient. Asks PyTorch.

    Examples:
        >>> is_initialized("cpu")
        False
    """
    if KINDS.get(device_type, _LIKE_CUDA).is_host:
        return False
    module: Any = torch.get_device_module(device_type)
    with without_stage_warnings():
        return bool(getattr(module, "is_initialized", bool)())


def computes_bf16(device_type: str) -> bool:
    """Return whether a device computes in bfloat16 without emulation.

    Effects: ambient. Asks PyTorch.

    Examples:
        >>> computes_bf16("cpu")
        False
    """
    module: Any = torch.get_device_module(device_type)
    supports = getattr(module, "is_bf16_supported", None)
    if supports is None:
        return KINDS.get(device_type, _LIKE_CUDA).has_bf16
    # CUDA and XPU also count devices that emulate it, on which it is slower than fp32.
    if "including_emulation" in inspect.signature(supports).parameters:
        return bool(supports(including_emulation=False))
    return bool(supports())


def fp8_capability(device: torch.device) -> tuple[int, int] | None:
    """Return the compute capability of a device; None where PyTorch does not multiply in fp8.

    Effects: ambient. Asks PyTorch.

    Examples:
        >>> fp8_capability(torch.device("cpu")) is None
        True
    """
    if kind_of(device).fp8_capability is None:
        return None
    module: Any = torch.get_device_module(device)
    return module.get_device_capability(device)


def library_versions(device_type: str) -> dict[str, str]:
    """Return the versions of what drives a device: PyTorch's toolkit, NCCL, or the plugin.

    Effects: ambient. Reads the metadata of installed packages.

    Examples:
        >>> library_versions("cpu")
        {}
    """
    versions: dict[str, str] = {}
    package = KINDS.get(device_type, _LIKE_CUDA).package
    if package:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # built from source
            versions[package] = "unknown"
    if package or KINDS.get(device_type, _LIKE_CUDA).is_host:
        return versions
    # ROCm builds also use the name of CUDA for the device, and set `hip`.
    for toolkit in ("cuda", "hip", "xpu"):
        version = getattr(torch.version, toolkit, None)
        if version is not None:
            versions[toolkit.upper()] = str(version)
    if "CUDA" in versions:
        nccl: Any = importlib.import_module("torch.cuda.nccl")
        with suppress(AttributeError):  # a build without it
            versions["NCCL"] = ".".join(map(str, nccl.version()))
    return versions


def table() -> str:
    """Return the table of device types in Markdown, for the documentation.

    Effects: pure.
    """
    lines = [
        "| device | hardware | package | communicates by | differs from CUDA |",
        "| --- | --- | --- | --- | --- |",
    ]
    for device_type, kind in KINDS.items():
        package = "torch"
        if kind.package:
            package = f"`{kind.package}`"
        library = kind.library or "nothing: one process"
        differences = ", ".join(_differences(kind)) or "nothing"
        lines.append(
            f"| `{device_type}` | {kind.hardware} | {package} | {library} | {differences} |"
        )
    return "\n".join(lines)


def _differences(kind: DeviceKind) -> Iterator[str]:
    """Yield in words how a device type differs from CUDA."""
    if kind.is_host:
        yield "memory of the host"
    if kind.is_process_bound:
        yield "one device per process, number 0"
    if not kind.has_pinned_memory and not kind.is_host:
        yield "no pinned memory"
    if not kind.can_fork:
        yield "no `notebook_launch`"
    if not kind.has_fp16_unscale:
        yield "fp16 unscaled by ordinary operators"
    if not kind.has_float64:
        yield "sums in float32"
    if kind.launch_variable:
        yield "`faccel launch` sets its environment"


def type_of_current_cuda_device() -> str:
    """Return the type of the device on which libraries for CUDA allocate, or why they cannot.

    Effects: ambient. Initializes CUDA.
    """
    try:
        return torch.empty(0, device=torch.cuda.current_device()).device.type
    except (RuntimeError, AssertionError) as error:
        return str(error).partition("\n")[0]
