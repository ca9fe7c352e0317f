"""What a model says of itself beside its weights: the files from which `from_pretrained` builds it."""

from __future__ import annotations

import copy
import os
import secrets
import shutil
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from faccel.checkpoint.files import sync_directory
from faccel.errors import CheckpointError


def describe(module: nn.Module, folder: str) -> None:
    """Write the configuration of a model whose class has one of its own, and what it generates with.

    Effects: ambient. A model inside of another (an adapter's base, say) is not described: the weights are not its own.

    Args:
        module: The user's; `config` fulfils its class's `config_class`, which has `save_pretrained`.
        folder: Where the files go.
    """
    kind: Any = type(module)
    config: Any = getattr(module, "config", None)
    if not isinstance(config, getattr(kind, "config_class", None) or ()) or not hasattr(
        config, "save_pretrained"
    ):
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
        _sync(os.path.join(folder, name))


def _users_class(kind: type) -> type:
    """Return the class that the user made the model of, which FSDP has derived another from."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return next(
        each for each in kind.__mro__ if fsdp is None or not issubclass(each, fsdp.FSDPModule)
    )


def adapter_of(module: Any) -> str | None:
    """Return the name of the active adapter of a model of PEFT; None for any other model.

    Raises:
        CheckpointError: Several are active.
    """
    if not hasattr(module, "peft_config"):
        return None
    names: Any = module.active_adapters
    names = names() if callable(names) else names
    if len(names) != 1:
        fix = "activate one with `set_adapter(name)`, and export them one after the other"
        raise CheckpointError(
            "one adapter is exported at a time",
            got=f"active: {', '.join(names) or 'none'}",
            fix=fix,
        )
    return names[0]


def write_adapter(
    module: Any, adapter: str, state: Mapping[str, torch.Tensor], path: str
) -> list[str]:
    """Let a model of PEFT write one adapter in its own format into `path`; return the name of the file with weights.

    Effects: ambient. What it would write besides, as a README, is left out.

    Args:
        module: The model; its own tensors are not read.
        adapter: The name of the adapter.
        state: Whole tensors of the model on the CPU, the adapter's among them.
        path: A directory, made where it is missing.
    """
    temporary = os.path.join(path, f".tmp-export-{secrets.token_hex(4)}")
    os.makedirs(temporary)
    try:
        module.save_pretrained(
            temporary, state_dict=state, selected_adapters=[adapter], save_embedding_layers=False
        )
        inside = os.path.join(temporary, adapter)
        inside = (
            inside if os.path.isdir(inside) else temporary
        )  # the default one has no folder of its own
        names = sorted(name for name in os.listdir(inside) if name.startswith("adapter_"))
        for name in names:
            _sync(os.path.join(inside, name))
            os.replace(os.path.join(inside, name), os.path.join(path, name))
        sync_directory(path)
        return [name for name in names if name.endswith(".safetensors")]
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sync(path: str) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
