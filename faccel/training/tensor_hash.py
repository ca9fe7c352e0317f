"""A 64-bit hash of the bits of a tensor, computed on its device."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from faccel.device_table import is_host

# Odd constants: a multiplication by one is reversible modulo 2^64. The second one comes from the
# finalizer of P. Degski, which changes half of the bits of the result for each bit of the input.
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MULTIPLIER = 0xD6E8FEB86659FD93 - (1 << 64)
_LOW_32_BITS = (1 << 32) - 1
# Words of 8 bytes of which temporary tensors are made. Those of the host fit into a cache.
_HOST_CHUNK = 1 << 17
_DEVICE_CHUNK = 1 << 22


def hash_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return a hash of the bits of a tensor, `int64[]` on its device.

    It is the sum over all words `w_i` of 64 bits of `mix(w_i + i * c)` modulo 2^64. `mix` is
    reversible, so a change of one word always changes the hash; any other change is missed with
    probability 2^-64. Integer sums do not depend on the order of their terms: the hash of the same
    bits is the same on every device and in every run. Does not wait for the device.

    Effects: pure. Allocates 64 MiB at most, and a copy where `tensor` is not contiguous.

    Args:
        tensor: Any dtype. The bits count: `-0.0` and `0.0` differ, and so do two NaNs of different
            bits. Of a sparse one, indices and values count.

    Examples:
        >>> a, b = hash_tensor(torch.tensor([0.0, 1.0])), hash_tensor(torch.tensor([-0.0, 1.0]))
        >>> bool(a == b), bool(a == hash_tensor(torch.tensor([0.0, 1.0])))
        (False, True)
    """
    tensor = tensor.detach()
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
        return _hash_of([hash_tensor(getattr(tensor, name)) for name in names])
    if tensor.layout != torch.strided:
        coalesced = tensor.coalesce()
        return _hash_of([hash_tensor(coalesced.indices()), hash_tensor(coalesced.values())])
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    elements = tensor.resolve_neg().contiguous().view(-1)
    bits = elements.view(torch.uint8)
    num_words = len(bits) // 8
    # A view as int64 needs an address that is a multiple of 8.
    if bits.storage_offset() % 8:
        bits = bits.clone()
    total = _hash_words(bits[: 8 * num_words].view(torch.int64))
    rest = bits[8 * num_words :]
    if len(rest):
        padded = torch.zeros(8, dtype=torch.uint8, device=bits.device)
        padded[: len(rest)] = rest
        total = _hash_words(torch.cat([total.view(1), padded.view(torch.int64)]))
    return total


def mix_(x: torch.Tensor) -> torch.Tensor:
    """Replace each number of `int64[...]` by another one, reversibly. Updates and returns `x`."""
    for _ in range(2):
        x ^= (x >> 32) & _LOW_32_BITS  # the mask: `>>` copies the sign
        x *= _MULTIPLIER
    x ^= (x >> 32) & _LOW_32_BITS
    return x


def _hash_of(hashes: list[torch.Tensor]) -> torch.Tensor:
    return _hash_words(torch.stack(hashes))


def _hash_words(words: torch.Tensor) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    num_words = _HOST_CHUNK if is_host(words.device) else _DEVICE_CHUNK
    start = 0
    for chunk in words.split(num_words):
        stop = start + len(chunk)
        numbers = torch.arange(start + 1, stop + 1, device=words.device)
        total += mix_(numbers.mul_(_GOLDEN).add_(chunk)).sum()
        start = stop
    return total
