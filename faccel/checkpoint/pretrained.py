"""What a model says of itself beside its weights: the files from which `from_pretrained` builds it."""

from __future__ import annotations

import copy
import os
import sys
from typing import Any

from torch import nn


def describe(module: nn.Module, folder: str) -> None:
    """Write the configuration of a model whose class has one of its own, and what it generates with.

    Effects: ambient. A model inside of another (an adapter's base, say) is not described: the weights are not its own.

    Args:
        module: The user's; `config` fulfils its class's `config_class`, which has `save_pretrained`.
        folder: Where the files go.
    """
    kind: Any = type(module)
    config: Any = getattr(module, "config", None)
    if not isinstance(config, getattr(kind, "config_class", None) or ()) or not hasattr(config, "save_pretrained"):
        return
    config = copy.deepcopy(config)  # the user's stays as it is
    config.architectures = [_users_class(kind).__name__]
    config.dtype = next(p.dtype for p in module.parameters() if p.is_floating_point())
    before = set(os.listdir(folder))
    config.save_pretrained(folder)
    generation: Any = getattr(module, "generation_config", None)
    if hasattr(generation, "save_pretrained"):
        generation.save_pretrained(folder)
    for name in set(os.listdir(folder)) - before:
        with open(os.path.join(folder, name), "rb") as file:
            os.fsync(file.fileno())


def _users_class(kind: type) -> type:
    """Return the class that the user made the model of, which FSDP has derived another from."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return next(each for each in kind.__mro__ if fsdp is None or not issubclass(each, fsdp.FSDPModule))
