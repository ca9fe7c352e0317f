"""Which errors of PyTorch, of its devices and of the libraries below are out of memory."""

import errno

import numpy as np
import pytest
import torch

from faccel.errors import RankFailedError
from faccel.training.out_of_memory import is_out_of_memory

# As the libraries print them: PyTorch's allocators, cuBLAS, cuDNN, NCCL, Level Zero and XLA.
_MESSAGES = [
    "CUDA out of memory. Tried to allocate 36.00 MiB (GPU 0; 7.93 GiB total capacity)",
    "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
    "HIP out of memory. Tried to allocate 2.00 GiB",
    "NCCL error in: ProcessGroupNCCL.cpp:77, unhandled cuda error\nCuda failure 2 'out of memory'",
    "XPU out of memory. Tried to allocate 1.00 GiB",
    "level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)",
    "MPS backend out of memory (MPS allocated: 9.05 GB, other allocations: 1.2 MB)",
    "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried",
    "[enforce fail at alloc_cpu.cpp:83] data. DefaultCPUAllocator: not enough memory: you tried",
    "std::bad_alloc",
    "unable to mmap 1024 bytes from file </weights>: Cannot allocate memory (12)",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a",
    "GET was unable to find an engine to execute this computation",
    "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`",
    "RESOURCE_EXHAUSTED: Attempting to reserve 6.48G at the bottom of memory.",
    "Bad StatusOr access: RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem.",
    "Resource exhausted: From /job:tpu_worker/replica:0/task:0: Attempting to reserve 3.95G",
]
# Errors whose texts are near, and which a smaller batch does not cure.
_OTHERS = [
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that "
                 "dataloader's workers are out of shared memory."),
    ValueError("`memory` must not be `out of memory`"),
    OSError(errno.ENOSPC, "No space left on device"),
    RankFailedError("rank 1 raised OutOfMemoryError: CUDA out of memory"),
    KeyboardInterrupt(),
]  # fmt: skip


def _raised(function: object, *args: object) -> BaseException:
    try:
        function(*args)  # type: ignore[operator]
    except BaseException as error:
        return error
    raise AssertionError("the call did not raise")


@pytest.mark.parametrize("message", _MESSAGES)
def test_the_message_of_each_allocator_is_out_of_memory(message: str) -> None:
    assert is_out_of_memory(RuntimeError(message))


@pytest.mark.parametrize("error", _OTHERS, ids=repr)
def test_other_errors_are_not_out_of_memory(error: BaseException) -> None:
    assert not is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("Allocation on device 0"),
        torch.cuda.OutOfMemoryError("Allocation on device 0"),
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
    ids=repr,
)
def test_an_out_of_memory_type_needs_no_text(error: Exception) -> None:
    assert is_out_of_memory(error)


def test_real_failed_allocations_of_the_cpu_are_recognised() -> None:
    for error in (
        _raised(lambda: torch.empty(2**60, dtype=torch.uint8)),
        _raised(lambda: torch.zeros(2**58)),
        _raised(lambda: np.empty(2**60, dtype=np.uint8)),
        _raised(lambda: bytearray(2**60)),
    ):
        assert is_out_of_memory(error), repr(error)


def _raise_from(cause: BaseException) -> None:
    raise KeyError("a wrapper of the user") from cause


def _raise_while_handling(error: BaseException) -> None:
    try:
        raise error
    except type(error):
        {}["a mistake in the handler"]


def _raise_from_none(error: BaseException) -> None:
    try:
        raise error
    except type(error):
        raise KeyError("hidden") from None


def test_a_cause_and_a_context_count_unless_they_are_hidden() -> None:
    memory_error = torch.OutOfMemoryError("Allocation on device 0")
    assert is_out_of_memory(_raised(_raise_from, memory_error))
    assert is_out_of_memory(_raised(_raise_while_handling, memory_error))
    assert is_out_of_memory(_raised(_raise_from, _raised(_raise_from, memory_error)))
    assert not is_out_of_memory(_raised(_raise_from_none, memory_error))
    assert not is_out_of_memory(_raised(_raise_from, ValueError("another cause")))


def test_an_interrupt_while_an_out_of_memory_error_is_handled_still_ends_the_run() -> None:
    interrupt = KeyboardInterrupt()
    interrupt.__context__ = torch.OutOfMemoryError("Allocation on device 0")
    assert not is_out_of_memory(interrupt)


def test_a_cycle_of_causes_ends() -> None:
    first, second = ValueError("first"), ValueError("second")
    first.__cause__, second.__cause__ = second, first
    assert not is_out_of_memory(first)
