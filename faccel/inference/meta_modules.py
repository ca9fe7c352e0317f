"""`on_meta`: builds models without memory for their parameters."""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from faccel.effects import AMBIENT, effectful


# `torch.device("meta")` would put buffers there, too, and their values would be lost. Accelerate
# replaces `nn.Module.register_parameter` for all threads.
@effectful(AMBIENT)
@contextmanager
def on_meta() -> Generator[None]:
    """Return a context in which modules are built with their parameters on the meta device.

    Effects: ambient, until the context ends; other threads build modules as before. Buffers keep
    their values, because many are computed and are not stored in checkpoints. Fill the model with
    `place`, or with `faccel.wrap` and `faccel.checkpoint.load_model` on any mesh.

    Examples:
        >>> with on_meta():
        ...     net = nn.Linear(10**4, 10**5)  # 4 GB
        >>> net.weight.device
        device(type='meta')
    """
    thread = threading.get_ident()

    def to_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> nn.Parameter | None:
        # The hook is the process's.
        if param is None or param.is_meta or threading.get_ident() != thread:
            return None  # the parameter itself: a tied one stays tied
        return nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)

    handle = register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()
