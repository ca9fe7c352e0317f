"""Gradient transformations: pairs of pure functions over TensorDicts, and `chain`.

After optax (DeepMind, 2020): `init(params) -> state`, and
`update(updates, state, params) -> (updates, state)`. One thing differs: an optimizer does not
return what to add to the parameters, but the new parameters. Only so can its arithmetic be that
of PyTorch's kernels, bit for bit: `p.addcdiv_(m, v)` rounds once, `p + (m / v)` twice.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import attrs
import torch
from tensordict import TensorDict

from faccel.checks import instance_of
from faccel.errors import OptimizerError
from faccel.func.tensordicts import check_same_structure, to_tensordict
from faccel.tree import Tree

Flag = bool | torch.Tensor
"""A condition: a bool, or bool[] under a PyTorch transform, where its value is unknown."""


class Role(enum.Enum):
    """What a gradient transformation does in a chain, which decides where it can stand."""

    GRADIENTS = "changes gradients; stands before the optimizer"
    CONTROL = "skips or scales the update of what comes after it; stands before the optimizer"
    OPTIMIZER = "computes the new parameters; at most one in a chain"
    PARAMS = "reads the new parameters; stands after the optimizer"
    ANY = "stands anywhere"


# Roles that have no effect after the optimizer: the gradients are already used.
_BEFORE_OPTIMIZER = (Role.GRADIENTS, Role.CONTROL, Role.OPTIMIZER)


class Updates(NamedTuple):
    """The value that passes through a chain of transformations.

    Args:
        grads: Gradients, `T[...]` under the names of the parameters.
        params: The new parameters; None before the optimizer, or if the update is skipped.
        lr_scale: Factor of the learning rate of the optimizer that follows.
        apply: Whether the transformations that follow are applied.
        metrics: 0-d tensors by name, such as `grad_norm` and `skipped`; never written in place.
        donate: Whether gradients, states and parameters may be overwritten.
    """

    grads: TensorDict
    params: TensorDict | None = None
    lr_scale: float | torch.Tensor = 1.0
    apply: Flag = True
    metrics: Mapping[str, torch.Tensor] = {}
    donate: bool = False


class Init(Protocol):
    """Returns the state of a transformation before the first update."""

    def __call__(self, params: TensorDict, /) -> TensorDict: ...


class Update(Protocol):
    """Returns transformed updates and the next state."""

    def __call__(
        self, updates: Updates, state: TensorDict, params: TensorDict, /
    ) -> tuple[Updates, TensorDict]: ...


@attrs.frozen(eq=False, slots=False)
class GradientTransformation:
    """A pair of pure functions, as a value.

    Args:
        name: Name of its state in a `chain`.
        init: `init(params) -> state`.
        update: `update(updates, state, params) -> (updates, state)`.
        role: What it does in a chain.
    """

    name: str
    init: Init
    _update: Update = attrs.field(alias="update", repr=False)
    role: Role = Role.ANY

    def update(
        self, updates: Updates | TensorDict, state: TensorDict, params: TensorDict
    ) -> tuple[Updates, TensorDict]:
        """Return the transformed updates and the next state.

        Effects: pure, unless `updates.donate`.

        Args:
            updates: Gradients, or what the transformation before this one returned.
            state: From `init`, or from the last `update`.
            params: The current parameters.

        Raises:
            OptimizerError: `state` is the state of another transformation.
            TreeError: Gradients and parameters differ in structure, shape or dtype; names the leaf.
        """
        # The first transformation gets plain gradients, which are checked once per update.
        if not isinstance(updates, Updates):
            check_same_structure(params, updates, "gradients")
            updates = Updates(updates)
        return self._update(updates, state, params)


def apply_updates(params: TensorDict, updates: Updates) -> TensorDict:
    """Return the new parameters: `params` themselves if the update was skipped.

    Effects: pure.

    Examples:
        >>> from faccel.func import apply_updates, sgd
        >>> params, grads = TensorDict({"w": torch.ones(())}), TensorDict({"w": torch.tensor(2.0)})
        >>> optimizer = sgd(0.1)
        >>> updates, state = optimizer.update(grads, optimizer.init(params), params)
        >>> apply_updates(params, updates)["w"]
        tensor(0.8000)
    """
    if updates.params is None:
        return params
    return updates.params


def is_traced(params: Mapping[str, torch.Tensor] | TensorDict | None = None) -> bool:
    """Return whether a transform is active: `compile`, `vmap`, `grad`, or autograd on `params`.

    Under a transform tensors have no values yet, and must not be written in place.
    """
    # `torch.compile` traces with fake tensors: no value can be read.
    if torch.compiler.is_compiling():
        return True
    # PyTorch has no public function for "inside of vmap or grad".
    if torch._C._functorch.peek_interpreter_stack() is not None:  # pyright: ignore
        return True
    if params is None or not torch.is_grad_enabled():
        return False
    return any(param.requires_grad for param in params.values())


def empty_state(params: TensorDict, /) -> TensorDict:
    """Return the state of a transformation without one."""
    return to_tensordict({})


def to_bool(flag: Flag) -> Flag:
    """Return a flag as a bool, waiting for the device; a tensor under a transform."""
    if isinstance(flag, torch.Tensor) and not is_traced():
        return bool(flag)
    return flag


def logical_and(a: Flag, b: Flag) -> Flag:
    """Return whether both flags are true, as a bool if either is a bool that is False."""
    # A bool is known on the host: False skips the rest without computing it.
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a & b
    if isinstance(a, torch.Tensor):
        return a if b else False
    return b if a else False


def where(flag: torch.Tensor, if_true: Tree, if_false: Tree) -> TensorDict:
    """Return `if_true` where `flag`, else `if_false`, leaf by leaf."""
    selected: dict[str, Tree] = {}
    for name, value in if_true.items():
        if isinstance(value, torch.Tensor):
            # counts are on the CPU, parameters on the device
            selected[name] = torch.where(flag.to(value.device), value, if_false[name])
        else:
            selected[name] = where(flag, value, if_false[name])
    return to_tensordict(selected)


def check_transformation(value: object, name: str = "transformation") -> None:
    """Raise OptimizerError unless the argument `name` is a gradient transformation."""
    instance_of(
        name,
        value,
        GradientTransformation,
        fix="write `func.adamw(1e-3)`, or `func.chain(func.clip_by_global_norm(1.0), ...)`",
        error=OptimizerError,
    )


def state_error(name: str, got: Sequence[str], expected: Sequence[str]) -> OptimizerError:
    """Return the error of an `update` whose state belongs to another transformation."""
    return OptimizerError(
        f"this is not the state of `{name}`",
        got=f"the entries {_quoted(got)} instead of {_quoted(expected)}",
        fix="pass the same transformation to `init_state` and `make_step`",
    )


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names))


def chain(*transformations: GradientTransformation) -> GradientTransformation:
    """Return the transformation that applies several in order.

    `accumulate` and `skip_nonfinite` can skip an update: the transformations after them are then
    not applied, and keep their state.

    Effects: pure.

    Args:
        *transformations: At most one of them is an optimizer. The state of each is stored under
            its name; of equal names the second one gets the suffix `_1`.

    Raises:
        OptimizerError: Two optimizers, or a transformation on the wrong side of the optimizer.

    Examples:
        >>> from faccel.func import adamw, chain, clip_by_global_norm
        >>> optimizer = chain(clip_by_global_norm(1.0), adamw(1e-3))
        >>> sorted(optimizer.init(TensorDict({"w": torch.ones(2)})).keys())
        ['adamw', 'clip_by_global_norm']
    """
    # States are stored under names, so that a checkpoint does not depend on positions.
    by_name: dict[str, GradientTransformation] = {}
    counts: dict[str, int] = {}
    for transformation in transformations:
        check_transformation(transformation)
        name = transformation.name
        number = counts.get(name, 0)
        counts[name] = number + 1
        by_name[f"{name}_{number}" if number else name] = transformation
    _check_order(transformations)
    links = _Chain(by_name)
    return GradientTransformation("chain", links.init, links.update, _role_of(transformations))


def _role_of(transformations: Sequence[GradientTransformation]) -> Role:
    """Return the role of a chain."""
    roles = {transformation.role for transformation in transformations}
    if not roles:
        return Role.ANY
    # An optimizer in the chain is what a control acts on, so the chain as such is an optimizer.
    for role in (Role.OPTIMIZER, Role.CONTROL):
        if role in roles:
            return role
    return Role.GRADIENTS


def _check_order(transformations: Sequence[GradientTransformation]) -> None:
    # Name of the optimizer that was passed already; empty before it.
    optimizer = ""
    for transformation in transformations:
        name = transformation.name
        if optimizer and transformation.role in _BEFORE_OPTIMIZER:
            raise OptimizerError(
                f"`{name}` must come before the optimizer of a chain",
                got=f"`{name}` after `{optimizer}`",
                fix="put one optimizer last, as in `chain(clip_by_global_norm(1.0), adamw(1e-3))`; "
                "use `partition` for several optimizers in one model",
            )
        if transformation.role is Role.PARAMS and not optimizer:
            raise OptimizerError(
                f"`{name}` reads the new parameters, so it must come after an optimizer",
                got=f"`{name}` before any optimizer",
                fix=f"write `chain(adamw(1e-3), {name}(...))`",
            )
        if transformation.role is Role.OPTIMIZER:
            optimizer = name


@attrs.frozen(eq=False)
class _Chain:
    """The transformations of a chain, by the names of their states, in order."""

    transformations: Mapping[str, GradientTransformation]

    def init(self, params: TensorDict, /) -> TensorDict:
        states: dict[str, TensorDict] = {}
        for name, transformation in self.transformations.items():
            states[name] = transformation.init(params)
        return to_tensordict(states)

    def update(
        self, updates: Updates, state: TensorDict, params: TensorDict, /
    ) -> tuple[Updates, TensorDict]:
        states: dict[str, Tree] = dict(state.items())
        # A state of another chain would otherwise fail deep inside with a KeyError.
        if states.keys() != self.transformations.keys():
            raise state_error("chain", list(states), list(self.transformations))
        updates, states = self._apply(list(self.transformations), updates, states, params)
        return updates, to_tensordict(states)

    def _apply(
        self, names: Sequence[str], updates: Updates, states: dict[str, Tree], params: TensorDict
    ) -> tuple[Updates, dict[str, Tree]]:
        """Apply the transformations `names` in order, until one of them skips the update."""
        # The states of transformations that are not applied stay in it unchanged.
        new_states = dict(states)
        for i, name in enumerate(names):
            transformation = self.transformations[name]
            updates, new_states[name] = transformation.update(updates, states[name], params)
            remaining = names[i + 1 :]
            if updates.apply is not True and remaining:
                return self._apply_if(updates, remaining, new_states, params)
        return updates, new_states

    def _apply_if(
        self, updates: Updates, names: Sequence[str], states: dict[str, Tree], params: TensorDict
    ) -> tuple[Updates, dict[str, Tree]]:
        """Apply the transformations `names` if `updates.apply`.

        If it is a tensor, they are computed in any case, and the result is selected with `where`.
        """
        condition = updates.apply
        if not isinstance(condition, torch.Tensor):
            return updates, states  # it is False
        # The old values are needed where the condition is false, so nothing may be overwritten.
        branch = updates._replace(apply=True, donate=False)
        branch, branch_states = self._apply(names, branch, states, params)
        new_params = branch.params
        if new_params is not None:
            new_params = where(condition, new_params, apply_updates(params, updates))
        new_states = dict(states)
        for name in names:
            new_states[name] = where(condition, branch_states[name], states[name])
        # A later transformation of the branch may skip the update, too.
        apply = logical_and(condition, branch.apply)
        return branch._replace(params=new_params, apply=apply, donate=updates.donate), new_states
