"""Recognise out-of-memory errors of PyTorch's devices and of the libraries below it."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import torch

from faccel.errors import FaccelError

# Texts of a `RuntimeError`, compared in lower case. Only CUDA and XPU have a type for it in all
# supported versions of PyTorch, and even there cuBLAS, cuDNN and NCCL raise a plain `RuntimeError`.
_TEXTS = (
    # "CUDA out of memory", "CUDA error: out of memory", "HIP out of memory", "XPU out of memory",
    # "MPS backend out of memory", "Cuda failure 2 'out of memory'" (NCCL), "Ran out of memory"
    "out of memory",
    # "DefaultCPUAllocator: can't allocate memory", on Windows "... not enough memory"
    "defaultcpuallocator",
    # C++ on the host, and `mmap` of a file or of shared memory
    "bad_alloc",
    "cannot allocate memory",
    # XLA; "Resource exhausted" before torch_xla 2.0
    "resource_exhausted",
    "resource exhausted",
    # CUBLAS_STATUS_, CUDNN_STATUS_, CUSOLVER_STATUS_, CUSPARSE_STATUS_, HIPBLAS_STATUS_, CUFFT_
    "alloc_failed",
    # cuDNN 9: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED and ..._HOST_...
    "allocation_failed",
    # Level Zero below XPU: UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY, ..._OUT_OF_HOST_MEMORY
    "out_of_device_memory",
    "out_of_host_memory",
    # cuDNN, if no algorithm has a workspace that fits into the free memory. An unsupported
    # operation has the same texts. It fails with smaller batches, too, and is raised then.
    "cudnn_status_not_supported",
    "unable to find an engine to execute this computation",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether this process ran out of memory, on the host or on a device.

    An error that was raised from an out-of-memory error, or while one was handled, counts, too.
    `raise ... from None` hides it. Errors of other ranks do not count: their text is quoted in a
    `FaccelError` here.

    Effects: pure.

    Args:
        error: What an allocation, a kernel, a loader or a collective has raised.

    Returns:
        Always False for an exception that ends the process, such as `KeyboardInterrupt`.

    Examples:
        >>> is_out_of_memory(RuntimeError("MPS backend out of memory (MPS allocated: 9.0 GB)"))
        True
        >>> is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
        False
    """
    if not isinstance(error, Exception):
        return False
    return any(_is_allocation_error(link) for link in _chain(error))


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield `error`, then its causes as a traceback prints them."""
    visited: set[int] = set()
    link: BaseException | None = error
    # `raise a from b` in a handler of `a` makes a cycle, which Python permits.
    while link is not None and id(link) not in visited:
        visited.add(id(link))
        yield link
        context = link.__context__
        if link.__suppress_context__:
            context = None
        link = link.__cause__ or context


def _is_allocation_error(error: BaseException) -> bool:
    """Return whether `error` itself reports a failed allocation."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if not isinstance(error, RuntimeError) or isinstance(error, FaccelError):
        return False
    message = str(error).lower()
    return any(text in message for text in _TEXTS)
