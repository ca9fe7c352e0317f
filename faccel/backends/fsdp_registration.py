"""Which parameters the modules of an FSDP2 model have between two calls: the sharded ones.

FSDP2 keeps the parameters of the root gathered after forward, because backward needs them first,
and registers the gathered tensors with the modules until backward ends (torch 2.13). After a
forward without a backward they would stay there: an optimizer would be made from copies that are
never trained, and a checkpoint would not know the names of the parameters in the optimizer.

So that `model.parameters()` returns the same objects at any time, the sharded parameters are
registered again at the end of each call. The gathered ones keep their memory if a backward can
follow, so that nothing is gathered twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import attrs
from torch import nn

from faccel.parallel.eager_code import methods_without_graphs
from faccel.torch_names import fsdp_param_groups
from faccel.tree import plain_tensor


class FsdpParam(Protocol):
    """The attributes of FSDP2's private `FSDPParam` that are used here."""

    sharded_param: Any
    unsharded_param: Any


class FsdpGroup(Protocol):
    """The attributes of FSDP2's private `FSDPParamGroup` that are used here."""

    fsdp_params: Sequence[FsdpParam]

    @property
    def is_sharded(self) -> bool: ...

    @property
    def is_unsharded(self) -> bool: ...

    def _to_sharded(self) -> None: ...


def fsdp_groups(module: nn.Module) -> list[Any]:
    """Return FSDP2's records of the parameters of `module`, one for each unit and the root."""
    groups: list[Any] = []
    for submodule in module.modules():
        get_state = getattr(submodule, "_get_fsdp_state", None)
        if get_state is not None:
            # Private: torch has no public access to what a unit has gathered.
            groups.extend(fsdp_param_groups(get_state()))
    return groups


def free_gathered(module: nn.Module) -> None:
    """Free the parameters that FSDP2 may have kept for a backward, which does not follow."""
    for group in fsdp_groups(module):
        group._to_sharded()  # pyright: ignore[reportPrivateUsage]


@attrs.frozen(eq=False)
class _Slot:
    """One name of a parameter in a module.

    Args:
        params: The parameters of the module by name.
        name: The name.
        fsdp_param: FSDP2's record of the parameter.
    """

    params: dict[str, Any]
    name: str
    fsdp_param: FsdpParam


def _slots(group: Any) -> list[_Slot]:
    """Return where the parameters of a group are registered; a tied parameter has several names."""
    slots: list[_Slot] = []
    for fsdp_param in group.fsdp_params:
        info = fsdp_param._module_info
        modules = [info.module, *info.shared_modules]
        names = [info.param_name, *info.shared_param_names]
        for module, name in zip(modules, names, strict=True):
            slots.append(_Slot(module._parameters, name, fsdp_param))
    return slots


@methods_without_graphs
@attrs.frozen(eq=False)
class Registration:
    """Registers the sharded or the gathered parameters of one model with its modules.

    Args:
        slots: Where the parameters of each group are registered.
    """

    slots: Mapping[FsdpGroup, Sequence[_Slot]]
    _versions: dict[FsdpGroup, int] = attrs.field(factory=dict, init=False)
    """The groups that stay gathered for a backward, with the version of their shards."""

    @classmethod
    def of(cls, module: nn.Module) -> Registration:
        """Return the registration of a module that FSDP2 has sharded."""
        return cls({group: _slots(group) for group in fsdp_groups(module)})

    def before_forward(self) -> None:
        """Register what an earlier forward has gathered, if the shards have not changed since.

        FSDP2 does not gather again what is gathered already: parameters that were loaded or
        updated in between would have no effect.
        """
        for group, version in self._versions.items():
            if _version(group) != version:
                group._to_sharded()  # pyright: ignore[reportPrivateUsage]
        self.before_backward()

    def before_backward(self) -> None:
        """Register what forward has gathered: activation checkpointing computes with it again."""
        while self._versions:
            group, _ = self._versions.popitem()
            # Another backward may have freed it.
            if group.is_unsharded:
                for slot in self.slots[group]:
                    slot.params[slot.name] = slot.fsdp_param.unsharded_param

    def after_forward(self, *, has_backward: bool) -> None:
        """Register the sharded parameters. Without a backward, also free the gathered ones.

        Args:
            has_backward: Whether a backward through the output is possible.
        """
        for group, slots in self.slots.items():
            if group.is_sharded:
                continue
            if not has_backward:
                group._to_sharded()  # pyright: ignore[reportPrivateUsage]
                continue
            # As FSDP2 does: `nn.Module.__setattr__` would take microseconds for each.
            for slot in slots:
                slot.params[slot.name] = slot.fsdp_param.sharded_param
            self._versions[group] = _version(group)


def _version(group: FsdpGroup) -> int:
    """Return a number that changes when a shard of the group is written."""
    version = 0
    for param in group.fsdp_params:
        version += version_of_shard(param.sharded_param)
    return version


def version_of_shard(shard: Any) -> int:
    """Return a number that changes when a shard is written."""
    # An operation on a DTensor changes its version, one on its local tensor that one's. The
    # attribute, because `to_local` records a node of the graph.
    local = shard._local_tensor
    return shard._version + local._version + plain_tensor(local)._version
