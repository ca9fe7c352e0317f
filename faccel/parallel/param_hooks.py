"""What users attach to parameters: hooks and attributes, read before parameters are replaced."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import attrs
from torch import nn

# Marks that libraries set on every parameter. They are not read in forward, and gathering the
# whole model for their sake would make `wrap` slower.
_MARKS = {"_is_hf_initialized"}


@attrs.frozen(eq=False)
class ParamHooks:
    """The hooks and attributes of one parameter.

    Args:
        attributes: The attributes that the user has set.
        grad_hooks: The hooks of `register_hook` by their id, or None.
        accumulate_hooks: The hooks of `register_post_accumulate_grad_hook`, or None.
    """

    attributes: Mapping[str, object]
    grad_hooks: Any
    accumulate_hooks: Any

    @classmethod
    def of(cls, param: nn.Parameter) -> ParamHooks:
        """Return what is attached to a parameter."""
        attributes: dict[str, object] = {}
        # The attributes of a tensor subclass are its inner tensors.
        if type(param) is nn.Parameter:
            attributes = dict(vars(param))
        return cls(attributes, param._backward_hooks, _accumulate_hooks(param))

    def set_on(self, param: nn.Parameter) -> None:
        """Attach the hooks and the attributes to another parameter. Updates `param`."""
        self.set_attributes(param)
        # The same dicts: `remove` of a handle, which the user has, removes the hook here, too.
        if self.grad_hooks:
            param._backward_hooks = self.grad_hooks
        if self.accumulate_hooks:
            cast("Any", param)._post_accumulate_grad_hooks = self.accumulate_hooks

    def set_attributes(self, param: nn.Parameter) -> None:
        """Set the attributes on another parameter. Updates `param`."""
        for name, value in self.attributes.items():
            if not hasattr(param, name):  # not what torch has set on it since
                setattr(param, name, value)

    @property
    def has_hooks(self) -> bool:
        """Whether a hook is registered."""
        return bool(self.grad_hooks) or bool(self.accumulate_hooks)

    @property
    def is_used_in_forward(self) -> bool:
        """Whether the gathered parameter needs it."""
        return self.has_hooks or not self.attributes.keys() <= _MARKS


def _accumulate_hooks(param: nn.Parameter) -> Any:
    return cast("Any", param)._post_accumulate_grad_hooks


def hooks_of(module: nn.Module) -> dict[str, ParamHooks]:
    """Return what is attached to each parameter of a module by name; nothing where it is empty."""
    by_name: dict[str, ParamHooks] = {}
    for name, param in module.named_parameters():
        hooks = ParamHooks.of(param)
        if hooks.attributes or hooks.has_hooks:
            by_name[name] = hooks
    return by_name
