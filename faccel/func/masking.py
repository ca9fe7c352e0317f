"""Transformations for some of the parameters: `masked`, `partition`, `frozen`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from fnmatch import fnmatchcase

import attrs
import torch
from tensordict import TensorDict

from faccel.errors import ConfigError, OptimizerError, nearest, short_repr
from faccel.func.gradient_transformation import (
    GradientTransformation,
    Role,
    Updates,
    apply_updates,
    check_transformation,
    empty_state,
)
from faccel.func.tensordicts import flat_dict, to_tensordict
from faccel.tree import Tree

Mask = Callable[[str, torch.Tensor], bool] | Mapping[str, bool] | Sequence[str]
Labels = Callable[[str, torch.Tensor], str] | Mapping[str, str]


def _selected_names(mask: Mask, params: TensorDict) -> list[str]:
    """Return the names of the parameters that a mask selects, in the order of the parameters."""
    # The three kinds of masks; names keep the order of the parameters.
    tensors = flat_dict(params)
    if callable(mask):
        return [name for name, param in tensors.items() if mask(name, param)]
    if isinstance(mask, Mapping):
        return _names_of_mapping(mask, tensors)
    patterns = [mask] if isinstance(mask, str) else mask
    # A pattern without a match is a typo, and would silently train the wrong parameters.
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in tensors):
            raise ConfigError(
                "a pattern in `mask` matches no parameter",
                got=f"`{pattern}`",
                fix=nearest(pattern, tensors),
            )
    return [name for name in tensors if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _names_of_mapping(mask: Mapping[str, bool], tensors: Mapping[str, torch.Tensor]) -> list[str]:
    for name in tensors.keys() ^ mask.keys():
        owner = "mask" if name in mask else "parameters"
        raise ConfigError(
            "a mapping as `mask` must have an entry for every parameter, and no others",
            got=f"`{name}` only in the {owner}",
            fix="name every parameter, or pass a function `(name, tensor) -> bool`",
        )
    return [name for name in tensors if mask[name]]


def _subset(tree: TensorDict, names: Sequence[str]) -> TensorDict:
    return to_tensordict({name: tree[name] for name in names})


def _replaced(tree: TensorDict, subset: TensorDict) -> TensorDict:
    """Return `tree` with the entries of `subset` swapped in."""
    return to_tensordict(flat_dict(tree) | flat_dict(subset))


@attrs.frozen(eq=False)
class _Masked:
    """A transformation of the parameters that a mask selects."""

    inner: GradientTransformation
    mask: Mask
    # A user's function is called once for each model, not at every update.
    _cache: dict[tuple[tuple[str, torch.Size], ...], list[str]] = attrs.field(
        factory=dict, init=False
    )

    def names(self, params: TensorDict) -> list[str]:
        """Return the names of the selected parameters."""
        # Shapes are part of the key, because a mask may depend on them.
        key = tuple((name, param.shape) for name, param in params.items())
        if key not in self._cache:
            self._cache[key] = _selected_names(self.mask, params)
        return self._cache[key]

    def init(self, params: TensorDict, /) -> TensorDict:
        # An optimizer without parameters has no state, as in a `partition` with an unused label.
        names = self.names(params)
        if not names:
            return to_tensordict({})
        return self.inner.init(_subset(params, names))

    def update(
        self, updates: Updates, state: TensorDict, params: TensorDict, /
    ) -> tuple[Updates, TensorDict]:
        names = self.names(params)
        if not names:
            return updates, state
        # The inner transformation sees a smaller model, so that norms are those of its parameters.
        inputs = updates._replace(grads=_subset(updates.grads, names))
        if updates.params is not None:
            inputs = inputs._replace(params=_subset(updates.params, names))
        outputs, state = self.inner.update(inputs, state, _subset(params, names))
        new_params = updates.params
        if outputs.params is not None:
            new_params = _replaced(apply_updates(params, updates), outputs.params)
        # `apply` and `lr_scale` of the inner chain end here: they concern its optimizer only.
        updates = updates._replace(
            grads=_replaced(updates.grads, outputs.grads),
            params=new_params,
            metrics=outputs.metrics,
        )
        return updates, state


def masked(inner: GradientTransformation, mask: Mask) -> GradientTransformation:
    """Return the transformation that applies `inner` to some of the parameters.

    The gradients and values of the other parameters are returned unchanged.

    Effects: pure.

    Args:
        inner: Any transformation but `accumulate`, `skip_nonfinite` and `scale_by_schedule` on
            their own: these act on a whole chain.
        mask: Which parameters: a function `(name, tensor) -> bool`, a bool for every name, or
            patterns such as `("blocks.*.weight",)`.

    Raises:
        ConfigError: In `init`: the mask has an unknown name, or a pattern that matches nothing.
        OptimizerError: `inner` acts on a whole chain.

    Examples:
        >>> from faccel.func import adamw, masked
        >>> no_biases = masked(adamw(1e-3), lambda name, param: param.ndim > 1)
        >>> state = no_biases.init(TensorDict({"w": torch.ones(2, 2), "b": torch.ones(2)}))
        >>> sorted(state["exp_avg"].keys())
        ['w']
    """
    check_transformation(inner)
    if inner.role is Role.CONTROL:
        raise OptimizerError(
            f"`{inner.name}` acts on the optimizer after it, which updates all parameters",
            got=f"`{inner.name}` for some of the parameters, without an optimizer of these",
            fix="put it before `masked` or `partition`, or inside with an optimizer: "
            f"`chain({inner.name}(...), adamw(1e-3))`",
        )
    selected = _Masked(inner, mask)
    return GradientTransformation(inner.name, selected.init, selected.update, inner.role)


def partition(
    transformations: Mapping[str, GradientTransformation], labels: Labels
) -> GradientTransformation:
    """Return the transformation that applies one of several to each parameter, by label.

    This is what parameter groups are in `torch.optim`.

    Effects: pure.

    Args:
        transformations: By label. Each sees only the parameters with its label: the norm of a
            `clip_by_global_norm` is the norm of these.
        labels: The label of each parameter: a function `(name, tensor) -> str`, or a label for
            every name.

    Raises:
        ConfigError: In `init`: a parameter has an unknown label.
        OptimizerError: Some labels have an optimizer, others do not.

    Examples:
        >>> from faccel.func import adamw, partition
        >>> groups = {"decay": adamw(1e-3, weight_decay=0.1), "rest": adamw(1e-3)}
        >>> optimizer = partition(groups, lambda name, p: "decay" if p.ndim > 1 else "rest")
        >>> state = optimizer.init(TensorDict({"w": torch.ones(2, 2), "b": torch.ones(2)}))
        >>> {label: sorted(state[label]["exp_avg"].keys()) for label in sorted(state.keys())}
        {'decay': ['w'], 'rest': ['b']}
    """

    def mask_of(label: str) -> Mask:
        return lambda name, param: _label_of(name, param, labels, transformations) == label

    # Each label is a mask: `partition` is several `masked` transformations in order.
    groups: dict[str, GradientTransformation] = {}
    for label, transformation in transformations.items():
        groups[label] = masked(transformation, mask_of(label))
    role = _common_role(groups)

    def init(params: TensorDict, /) -> TensorDict:
        return to_tensordict({label: group.init(params) for label, group in groups.items()})

    def update(
        updates: Updates, state: TensorDict, params: TensorDict, /
    ) -> tuple[Updates, TensorDict]:
        new_states: dict[str, Tree] = {}
        # One after the other: each group adds its new parameters to `updates.params`.
        for label, group in groups.items():
            updates, new_states[label] = group.update(updates, state[label], params)
        return updates, to_tensordict(new_states)

    return GradientTransformation("partition", init, update, role)


def _label_of(
    name: str, param: torch.Tensor, labels: Labels, transformations: Collection[str]
) -> str:
    label = labels(name, param) if callable(labels) else labels.get(name, "")
    if label not in transformations:
        raise ConfigError(
            f"the label of `{name}` must be a key of `transformations`",
            got=f"`{name}` with label {short_repr(label)}",
            fix=nearest(str(label), transformations),
        )
    return label


def _common_role(groups: Mapping[str, GradientTransformation]) -> Role:
    without_optimizer: list[str] = []
    for label, group in groups.items():
        if group.role is not Role.OPTIMIZER:
            without_optimizer.append(label)
    # Otherwise some parameters would silently never be trained.
    if not without_optimizer and groups:
        return Role.OPTIMIZER
    if len(without_optimizer) < len(groups):
        raise OptimizerError(
            "every label of a `partition` needs an optimizer if one label has one",
            got=f"no optimizer for `{'`, `'.join(sorted(without_optimizer))}`",
            fix="add one, as in `chain(clip_by_global_norm(1.0), adamw(1e-3))`, "
            "or write `frozen()` for parameters that are not trained",
        )
    if groups and all(group.role is Role.PARAMS for group in groups.values()):
        return Role.PARAMS
    return Role.GRADIENTS


def frozen() -> GradientTransformation:
    """Return the optimizer that leaves parameters unchanged, for `partition`.

    Effects: pure.

    Examples:
        >>> from faccel.func import adamw, frozen, partition
        >>> groups = {"head": adamw(1e-3), "body": frozen()}
        >>> optimizer = partition(groups, lambda name, param: name.split(".")[0])
        >>> sorted(optimizer.init(TensorDict({"head.w": torch.ones(1)}))["head"].keys())
        ['count', 'exp_avg', 'exp_avg_sq']
    """

    def update(
        updates: Updates, state: TensorDict, params: TensorDict, /
    ) -> tuple[Updates, TensorDict]:
        return updates._replace(params=apply_updates(params, updates)), state

    return GradientTransformation("frozen", empty_state, update, Role.OPTIMIZER)
