"""The parameters that DDP has registered, and how the model has changed since."""

from __future__ import annotations

from collections.abc import Mapping

import attrs
import torch
from torch import nn

_FIX = (
    "write `model = faccel.rewrap(model, ctx)` after the change, and pass new parameters to the "
    "optimizer with `opt.add_param_group`"
)


@attrs.frozen
class Change:
    """A change of one parameter after `wrap`.

    Args:
        name: Name of the parameter.
        got: What happened to it.
    """

    name: str
    got: str

    @property
    def problem(self) -> str:
        """The problem, for an error."""
        return f"`{self.name}` was changed after `faccel.wrap`, so its gradients are not reduced"

    @property
    def fix(self) -> str:
        """What to do about it."""
        return _FIX


@attrs.frozen(eq=False)
class StructureAtWrap:
    """The trainable parameters of a model when it was wrapped.

    Args:
        module: The user's module.
        params: The parameters by `id`, in the order of DDP's reducer.
        names: Their names, by `id`.
        types: Their dtypes and devices, by `id`.
    """

    module: nn.Module
    params: Mapping[int, nn.Parameter]
    names: Mapping[int, str]
    types: Mapping[int, tuple[torch.dtype, torch.device]]

    @classmethod
    def of(cls, module: nn.Module) -> StructureAtWrap:
        """Record the parameters of `module` that require gradients."""
        params: dict[int, nn.Parameter] = {}
        names: dict[int, str] = {}
        types: dict[int, tuple[torch.dtype, torch.device]] = {}
        for name, param in module.named_parameters():
            if param.requires_grad:
                params[id(param)] = param
                names[id(param)] = name
                types[id(param)] = (param.dtype, param.device)
        return cls(module, params, names, types)

    def by_name(self) -> dict[str, nn.Parameter]:
        """Return the parameters by name, in the same order on all ranks."""
        return {self.names[key]: param for key, param in self.params.items()}

    def name_of(self, param: torch.Tensor) -> str | None:
        """Return the name of a parameter that the model has now, else None."""
        for name, candidate in self.module.named_parameters():
            if candidate is param:
                return name
        return None

    def without_grad(self) -> str:
        """Return the names of the first parameters without a gradient, for a message."""
        names = [self.names[key] for key, param in self.params.items() if param.grad is None]
        if not names:
            return "gradients of other parameters only"
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return ", ".join(f"`{name}`" for name in names[:3]) + more

    def change(self) -> Change | None:
        """Return the first change since `wrap`, or None."""
        current = {id(param): name for name, param in self.module.named_parameters()}
        for key, param in self.params.items():
            description = None
            if key not in current:
                description = "it was removed or replaced"
            elif not param.requires_grad:
                description = "it was frozen"
            elif (param.dtype, param.device) != self.types[key]:
                old = self.types[key]
                description = f"{old[0]} on {old[1]} became {param.dtype} on {param.device}"
            if description is not None:
                return Change(self.names[key], description)
        for key, name in current.items():
            if key not in self.params and self.module.get_parameter(name).requires_grad:
                return Change(name, "it was added or unfrozen")
        return None
