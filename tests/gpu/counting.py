"""How often the host waits for a device, and how much memory a step needs, on a GPU or a CPU."""

import contextlib
import gc
import warnings
from collections import Counter

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

_READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal")
_COPIES = ("aten::_to_copy", "aten::copy_")


class _ReadsOfTensors(TorchDispatchMode):
    """Counts the operators that return values of a device's tensors to the host.

    On the CPU they wait for nothing. On an accelerator the host would wait there.
    """

    def __init__(self, device):
        super().__init__()
        self.device = device
        self.places = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if torch.distributed.tensor.DTensor in types:
            return NotImplemented  # its operators on plain tensors come here afterwards
        result = func(*args, **(kwargs or {}))
        sources = [leaf for leaf in tree_iter(args) if self._is_on_device(leaf)]
        is_read = func.name().partition(".")[0] in _READS
        is_copy = func.name().partition(".")[0] in _COPIES and not self._is_on_device(result)
        if sources and (is_read or is_copy):
            self.places[func.name()] += 1
        return result

    def _is_on_device(self, leaf):
        return isinstance(leaf, torch.Tensor) and leaf.device.type == self.device.type


@contextlib.contextmanager
def synchronisations(device):
    """Yield a Counter of the synchronisations of the body, by the place that caused them."""
    if device.type != "cuda":
        import torch.distributed.tensor

        with _ReadsOfTensors(device) as mode:
            yield mode.places
        return
    places = Counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        caught.clear()  # the warning that this mode is a prototype
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode("default")
            for warning in caught:
                if "synchronizing CUDA operation" in str(warning.message):
                    places[f"{warning.filename}:{warning.lineno}"] += 1


class _LiveBytes(TorchDispatchMode):
    """Adds up the memory of all tensors that operators return, and keeps the largest sum."""

    def __init__(self):
        super().__init__()
        self.peak = 0
        self._storages = {}  # by address: a `StorageWeakRef`

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if torch.distributed.tensor.DTensor in types:
            return NotImplemented
        result = func(*args, **(kwargs or {}))
        for leaf in tree_iter(result):
            if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta":
                storage = leaf.untyped_storage()
                self._storages[storage._cdata] = StorageWeakRef(storage)
        total = 0
        for address, reference in list(self._storages.items()):
            storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
            if storage is None:
                del self._storages[address]
            else:  # its present size: FSDP2 frees the memory of a storage and keeps the object
                total += storage.nbytes()
        self.peak = max(self.peak, total)
        return result


def peak_bytes(device, fn):
    """Return the most bytes of tensors on the device that are alive at once while `fn` runs."""
    gc.collect()
    if device.type != "cuda":
        import torch.distributed.tensor

        with _LiveBytes() as mode:
            fn()
        return mode.peak
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    fn()
    return torch.cuda.max_memory_allocated(device) - before
