"""Tensors that threads of gloo may still reference after the result of a collective is there."""

from __future__ import annotations

import time

import attrs
import torch

from faccel.device_table import is_host


def _is_referenced(alias: torch.Tensor) -> bool:
    """Return whether C++ has a reference to this tensor object, not only to its storage."""
    # 1 is the reference of the Python object `alias` itself.
    return alias._use_count() > 1  # type: ignore[attr-defined]


@attrs.frozen(eq=False)
class InFlight:
    """Keeps tensors for longer than the threads of gloo reference them.

    gloo's threads release a tensor only after its result is there. The last release needs the
    interpreter, which may be gone at exit: then the process aborts (1 of 120 in our tests;
    pytorch/pytorch#179291).
    """

    tensors: list[torch.Tensor] = attrs.field(factory=list, init=False)

    def add(self, x: torch.Tensor) -> None:
        """Keep `x`, to which only c10d adds references. Nothing for one on an accelerator."""
        if is_host(x.device):
            self.tensors.append(x)

    def alias(self, x: torch.Tensor) -> torch.Tensor:
        """Return a flat alias of a contiguous `x` for c10d, which is kept."""
        # A new tensor object over the same storage: only c10d adds references to it, whatever
        # references the caller has to `x`.
        flat = x.detach().view(-1)
        self.add(flat)
        return flat

    def forget_finished(self) -> None:
        """Release the tensors that no thread references."""
        # In place, because the fields of a frozen class cannot be assigned.
        self.tensors[:] = [tensor for tensor in self.tensors if _is_referenced(tensor)]

    def drain(self, timeout_s: float = 1.0) -> None:
        """Wait until no thread references a tensor.

        Joining the threads is impossible: DDP's reducer keeps their process group forever.
        """
        # Limited: a collective that never ends keeps its tensor, and the process must still exit.
        deadline = time.monotonic() + timeout_s
        while any(map(_is_referenced, self.tensors)) and time.monotonic() < deadline:
            time.sleep(0)  # lets other threads run
        self.tensors.clear()
