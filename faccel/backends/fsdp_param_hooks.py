"""What users attach to parameters, carried over to the parameters that FSDP2 replaces them by.

`fully_shard` makes two new parameters of each one: the shard, which optimizers update, and the
gathered parameter, which forward and backward use (torch 2.13). Hooks and attributes stay on the
old one, which is used no more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import attrs
import torch
from torch import nn

from faccel.backends.fsdp_registration import fsdp_groups
from faccel.comm.objects import gather_json
from faccel.context import DistContext
from faccel.parallel.param_hooks import ParamHooks
from faccel.torch_names import fsdp_param_groups


def attach(module: nn.Module, hooks: Mapping[str, ParamHooks], ctx: DistContext) -> None:
    """Attach to the parameters of a sharded module what the old ones had.

    Updates `module`; collective over the stage. Where the gathered parameters of a rank need it,
    their units are gathered once, one after the other, because FSDP2 makes gathered parameters
    when it gathers first.

    Args:
        module: The module that FSDP2 has sharded.
        hooks: From `hooks_of`, before it was sharded.
        ctx: The context.
    """
    params = dict(module.named_parameters())
    by_shard: dict[int, ParamHooks] = {}
    for name, param_hooks in hooks.items():
        param_hooks.set_attributes(params[name])
        if param_hooks.is_used_in_forward:
            by_shard[id(params[name])] = param_hooks
    used_by_unit: list[list[Any]] = []
    units = list(_units(module))
    for _, fsdp_params in units:
        used_by_unit.append([param for param in fsdp_params if id(param.sharded_param) in by_shard])
    is_used = [bool(used) for used in used_by_unit]
    # A hook may be on one rank only, such as one that logs on rank 0, and all have to gather.
    is_used_on_ranks = zip(*gather_json(is_used, ctx, axis="stage"), strict=True)
    for (submodule, _), used, flags in zip(units, used_by_unit, is_used_on_ranks, strict=True):
        if not any(flags):
            continue
        submodule.unshard()
        for fsdp_param in used:
            by_shard[id(fsdp_param.sharded_param)].set_on(fsdp_param.unsharded_param)
        submodule.reshard()


def gather_before_inference_mode(module: nn.Module) -> None:
    """Let FSDP2 make the gathered parameters, if `torch.inference_mode` is on and it has not.

    Collective that once. Tensors that are made in inference mode cannot be trained.

    Args:
        module: A module that FSDP2 has sharded, or one with such modules.
    """
    if not torch.is_inference_mode_enabled():
        return
    with torch.inference_mode(False), torch.no_grad():
        for submodule, fsdp_params in _units(module):
            if not all(hasattr(param, "_unsharded_param") for param in fsdp_params):
                submodule.unshard()
                submodule.reshard()


def _units(module: nn.Module) -> Iterator[tuple[Any, list[Any]]]:
    for submodule in module.modules():
        get_state = getattr(submodule, "_get_fsdp_state", None)
        if get_state is not None:
            fsdp_params: list[Any] = []
            for group in fsdp_param_groups(get_state()):
                fsdp_params.extend(group.fsdp_params)
            yield submodule, fsdp_params


@attrs.frozen(eq=False)
class ShardHooks:
    """Runs the hooks that users register on shards, after `wrap`.

    Autograd never reaches a shard: the gradient of a loss belongs to the gathered parameter.
    Hooks of `register_post_accumulate_grad_hook` need nothing, because FSDP2 calls them with the
    reduced gradient.

    Args:
        fsdp_params: FSDP2's records of the parameters of a model.
    """

    fsdp_params: list[Any]
    _connected: set[int] = attrs.field(factory=set, init=False)

    @classmethod
    def of(cls, module: nn.Module) -> ShardHooks:
        """Return the hooks of a module that FSDP2 has sharded."""
        fsdp_params: list[Any] = []
        for group in fsdp_groups(module):
            fsdp_params.extend(group.fsdp_params)
        return cls(fsdp_params)

    def before_backward(self) -> None:
        """Connect the hooks that are new since the last backward."""
        for index, fsdp_param in enumerate(self.fsdp_params):
            # In almost all models the only expression that runs: 0.1 us for each parameter.
            if not fsdp_param.sharded_param._backward_hooks or index in self._connected:
                continue
            # FSDP2 makes it in the first forward of the unit. The parameter may be frozen now.
            if hasattr(fsdp_param, "_unsharded_param") and fsdp_param.unsharded_param.requires_grad:
                fsdp_param.unsharded_param.register_hook(_run_hooks_of(fsdp_param))
                self._connected.add(index)


def _run_hooks_of(fsdp_param: Any) -> Any:
    def run_hooks(grad: torch.Tensor) -> torch.Tensor:
        # Read now: hooks are added and removed at any time.
        for hook in list((fsdp_param.sharded_param._backward_hooks or {}).values()):
            result = hook(grad)
            if result is not None:
                grad = result
        return grad

    return run_hooks
