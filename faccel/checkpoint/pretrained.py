"""The files beside the weights that transformers, diffusers, timm and PEFT read."""

from __future__ import annotations

import copy
import importlib
import json
import os
import secrets
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import nn

from faccel.checkpoint.files import sync_directory, sync_file
from faccel.errors import CheckpointError


class PretrainedConfig(Protocol):
    """The configuration of a transformers or diffusers model."""

    architectures: list[str]
    dtype: torch.dtype

    def save_pretrained(self, save_directory: str) -> object: ...


def weights_stem(module: nn.Module | None) -> str:
    """Return the name of the files with weights, without its extension, that a library reads.

    Effects: pure.
    """
    if _is_diffusers(module):
        return "diffusion_pytorch_model"
    return "model"


def _is_diffusers(module: nn.Module | None) -> bool:
    """Return whether a module is a model of diffusers: its class is a `ConfigMixin`."""
    is_config = getattr(type(module), "config_name", None) == "config.json"
    return is_config and callable(getattr(type(module), "save_config", None))


def _write_diffusers_config(module: nn.Module, folder: str) -> None:
    cast(Any, module).save_config(folder)
    path = Path(folder, "config.json")
    config = json.loads(path.read_text(encoding="utf-8"))
    # diffusers stores the name of the class, which FSDP2 has replaced by a subclass.
    config["_class_name"] = _user_class(type(module)).__name__
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    path.write_text(text, encoding="utf-8")


def _is_timm(module: nn.Module) -> bool:
    """Return whether a module was made by `timm.create_model`."""
    # Each of its models has the configuration of its pretrained weights, with its registered name.
    config: object = getattr(module, "pretrained_cfg", None)
    return "timm" in sys.modules and isinstance(config, Mapping) and "architecture" in config


def _write_timm_config(module: nn.Module, folder: str) -> None:
    # Its public function `save_for_hf` writes the weights, too, as they are in this process.
    hub: Any = importlib.import_module("timm.models._hub")
    hub.save_config_for_hf(module, os.path.join(folder, "config.json"))


def write_config(module: nn.Module, folder: str, dtype: torch.dtype | None = None) -> None:
    """Write the configuration of a model, and its generation configuration, if it has them.

    Effects: ambient. The model inside an adapter is not described: the weights are the adapter's.

    Args:
        module: The user's module. It has a configuration if `module.config` is an instance of its
            class's `config_class`.
        folder: The directory of the files.
        dtype: Of the files; None is the module's.
    """
    # The library decides which files it writes, so the new ones are those that need an fsync.
    existing = set(os.listdir(folder))
    if _is_diffusers(module):
        _write_diffusers_config(module, folder)
    elif _is_timm(module):
        _write_timm_config(module, folder)
    else:
        _write_pretrained_config(module, folder, dtype)
    for name in set(os.listdir(folder)) - existing:
        sync_file(os.path.join(folder, name))


def _write_pretrained_config(module: nn.Module, folder: str, dtype: torch.dtype | None) -> None:
    config = _config_of(module)
    if config is None:
        return
    config = copy.deepcopy(config)  # the user's is not modified
    # `from_pretrained` chooses the class and the dtype by these two fields.
    config.architectures = [_user_class(type(module)).__name__]
    param_dtypes = (param.dtype for param in module.parameters() if param.is_floating_point())
    config.dtype = dtype or next(param_dtypes)
    config.save_pretrained(folder)
    generation_config = getattr(module, "generation_config", None)
    save_generation_config = getattr(generation_config, "save_pretrained", None)
    if callable(save_generation_config):
        save_generation_config(folder)


def _config_of(module: nn.Module) -> PretrainedConfig | None:
    config = getattr(module, "config", None)
    config_class = getattr(type(module), "config_class", None)
    if config_class is None or not isinstance(config, config_class):
        return None
    return config if hasattr(config, "save_pretrained") else None


def _user_class(cls: type) -> type:
    """Return the user's class: FSDP2 replaces it by a subclass, whose name cannot be imported."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return cls
    for base in cls.__mro__:
        if not issubclass(base, fsdp.FSDPModule):
            return base
    return cls


def active_adapter(module: nn.Module) -> str | None:
    """Return the name of the active adapter of a PEFT model; None for any other model.

    Effects: pure.

    Raises:
        CheckpointError: Not exactly one adapter is active.
    """
    if not hasattr(module, "peft_config"):
        return None
    adapters: Any = getattr(module, "active_adapters", [])
    if callable(adapters):  # a method of transformers models with adapters, a property of PEFT's
        adapters = adapters()
    names: list[str] = adapters
    if len(names) != 1:
        raise CheckpointError(
            "exactly one adapter of the model must be active",
            got=f"active: {', '.join(names) or 'none'}",
            fix="activate one with `model.set_adapter(name)`, and export one after the other",
        )
    return names[0]


def write_adapter(
    module: nn.Module, adapter: str, state: Mapping[str, torch.Tensor], path: str
) -> list[str]:
    """Write one adapter of a PEFT model in PEFT's format; return the name of the file with weights.

    Effects: ambient. PEFT writes the files; its `README.md` is left out.

    Args:
        module: The model; its own tensors are not read, because they may be sharded.
        adapter: Name of the adapter.
        state: Full tensors of the model on the CPU, including the adapter's.
        path: A directory, created if it is missing.
    """
    temporary = os.path.join(path, f".tmp-export-{secrets.token_hex(4)}")
    os.makedirs(temporary)
    try:
        _save_adapter(module, adapter, state, temporary)
        # PEFT writes an adapter to a folder of its name, except the adapter named "default"
        folder = os.path.join(temporary, adapter)
        if not os.path.isdir(folder):
            folder = temporary
        names = sorted(name for name in os.listdir(folder) if name.startswith("adapter_"))
        for name in names:
            sync_file(os.path.join(folder, name))
            os.replace(os.path.join(folder, name), os.path.join(path, name))
        sync_directory(path)
        return [name for name in names if name.endswith(".safetensors")]
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _save_adapter(
    module: Any, adapter: str, state: Mapping[str, torch.Tensor], folder: str
) -> None:
    module.save_pretrained(
        folder, state_dict=state, selected_adapters=[adapter], save_embedding_layers=False
    )
