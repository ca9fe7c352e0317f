"""Gradient transformations: pairs of pure functions over TensorDicts, and what combines them.

After optax (DeepMind, 2020): `init(params) -> state`, `update(updates, state, params) -> (updates, state)`. What
differs is what travels: an optimizer does not return what to add to the parameters but the new parameters themselves,
because only so its arithmetic can be, bit for bit, that of torch's own kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import attrs
import torch
from tensordict import TensorDict

from faccel.errors import ConfigError, OptimizerError, nearest
from faccel.func.tensordicts import check_like, named, tensordict

Flag = bool | torch.Tensor
"""Whether something happens: as a bool, or as bool[] where the host does not know."""


class Updates(NamedTuple):
    """What travels through a chain of transformations.

    Args:
        grads: Gradients, `T[...]` under the names of the parameters.
        params: The new parameters; None until an optimizer has made them.
        lr_scale: What the learning rate of an optimizer further down is multiplied by.
        apply: Whether the rest of a chain happens.
        metrics: What is to be told, 0-d tensors by name: `grad_norm`, `skipped`.
        donate: Whether gradients, states and parameters may be written into.
    """

    grads: TensorDict
    params: TensorDict | None = None
    lr_scale: float | torch.Tensor = 1.0
    apply: Flag = True
    metrics: Mapping[str, torch.Tensor] = {}  # never written
    donate: bool = False


Init = Callable[[TensorDict], TensorDict]
Update = Callable[[Updates, TensorDict, TensorDict], tuple[Updates, TensorDict]]


@attrs.frozen(eq=False, slots=False)
class GradientTransformation:
    """A pair of pure functions, as a value.

    Args:
        name: What its state is called inside of a `chain`.
        init: `init(params) -> state`.
        update: `update(updates, state, params) -> (updates, state)`, from the gradients, or from what the
            transformation before this one returned.
        makes_params: Whether it is an optimizer, or holds one.
        wants: `"before"` where it must stand before the optimizer of a chain, `"after"` behind it, `""` anywhere.
        acts_on_rest: Whether it says something to what stands behind it: whether it happens, how large its steps are.
    """

    name: str
    init: Init
    _update: Update = attrs.field(alias="update", repr=False)
    makes_params: bool = False
    wants: str = ""
    acts_on_rest: bool = False

    def update(
        self, updates: Updates | TensorDict, state: TensorDict, params: TensorDict
    ) -> tuple[Updates, TensorDict]:
        """Return the updates to go on with, and the state after this one. Effects: pure, unless `updates.donate`.

        Raises:
            TreeError: Gradients and parameters differ in structure, shape or dtype; names the leaf.
        """
        if not isinstance(updates, Updates):
            check_like(params, updates, "gradients")
            updates = Updates(updates)
        return self._update(updates, state, params)


def apply_updates(params: TensorDict, updates: Updates) -> TensorDict:
    """Return the parameters that `updates` lead to: `params` themselves where an update was left out.

    Effects: pure.

    Examples:
        >>> from faccel.func import apply_updates, sgd
        >>> params, grads = TensorDict({"w": torch.ones(())}), TensorDict({"w": torch.tensor(2.0)})
        >>> optimizer = sgd(0.1)
        >>> updates, state = optimizer.update(grads, optimizer.init(params), params)
        >>> apply_updates(params, updates)["w"]
        tensor(0.8000)
    """
    return params if updates.params is None else updates.params


def is_traced(params: Any = None) -> bool:
    """Whether a transform of torch's looks on: compile, vmap, grad, or autograd from outside."""
    if torch.compiler.is_compiling():
        return True
    if torch._C._functorch.peek_interpreter_stack() is not None:  # pyright: ignore
        return True
    return (
        params is not None
        and torch.is_grad_enabled()
        and any(p.requires_grad for p in params.values())
    )


def empty(params: TensorDict) -> TensorDict:
    """Return the state of a transformation that has none."""
    return tensordict({})


def known(flag: Flag) -> Flag:
    """Return a flag as a bool, for which the host waits; a tensor only where a transform looks on."""
    return bool(flag) if isinstance(flag, torch.Tensor) and not is_traced() else flag


def choose(flag: torch.Tensor, new: Any, old: Any) -> Any:
    """Return `new` where `flag`, else `old`, leaf by leaf."""
    return tensordict(
        {
            name: torch.where(flag.to(each.device), each, old[name])
            if isinstance(each, torch.Tensor)
            else choose(flag, each, old[name])
            for name, each in new.items()
        }
    )


def chain(*transformations: GradientTransformation) -> GradientTransformation:
    """Return the transformation that does one after the other.

    One that says that an update is not to happen (`accumulate`, `skip_nonfinite`) ends the chain for this step: what
    stands behind it keeps its state.

    Effects: pure.

    Raises:
        OptimizerError: Two optimizers, or something on the wrong side of one.

    Examples:
        >>> from faccel.func import adamw, chain, clip_by_global_norm
        >>> optimizer = chain(clip_by_global_norm(1.0), adamw(1e-3))
        >>> sorted(optimizer.init(TensorDict({"w": torch.ones(2)})).keys())
        ['adamw', 'clip_by_global_norm']
    """
    parts: dict[str, GradientTransformation] = {}
    for each in transformations:
        check_transformation(each)
        number = sum(other.name == each.name for other in parts.values())
        parts[each.name if not number else f"{each.name}_{number}"] = each
    _check_order(transformations)

    links, makes = _Links(parts), any(each.makes_params for each in transformations)
    wants = "" if makes or not parts else "before"
    acts = not makes and any(each.acts_on_rest for each in transformations)
    return GradientTransformation("chain", links.init, links.update, makes, wants, acts)


def check_transformation(value: Any) -> None:
    """Refuse what is no gradient transformation."""
    if not isinstance(value, GradientTransformation):
        raise OptimizerError(
            "this takes gradient transformations",
            got=f"a {type(value).__name__}",
            fix="write `adamw(1e-3)`, of `faccel.func`, or `chain(clip_by_global_norm(1.0), adamw(1e-3))`",
        )


def _check_inner(inner: Any) -> None:
    check_transformation(inner)
    if inner.acts_on_rest:
        raise OptimizerError(
            f"`{inner.name}` acts on the optimizer behind it, which sees all parameters alike",
            got=f"`{inner.name}` for some of the parameters, without an optimizer of theirs",
            fix=f"put it in front, or inside with the optimizer: `chain({inner.name}(...), adamw(1e-3))`",
        )


@attrs.frozen(eq=False)
class _Links:
    """The parts of a chain, by the names of their states."""

    parts: Mapping[str, GradientTransformation]

    def init(self, params: TensorDict) -> TensorDict:
        return tensordict({name: each.init(params) for name, each in self.parts.items()})

    def update(
        self, updates: Updates, state: TensorDict, params: TensorDict
    ) -> tuple[Updates, TensorDict]:
        held = dict(state.items())
        if held.keys() != self.parts.keys():
            raise OptimizerError(
                "this is not the state of the chain",
                got=f"`{'`, `'.join(sorted(held))}` where `{'`, `'.join(sorted(self.parts))}` belong",
                fix="make state and step with the same transformation",
            )
        updates, new = self._run(list(self.parts), updates, held, params)
        return updates, tensordict(new)

    def _run(
        self, names: Sequence[str], updates: Updates, state: Mapping[str, Any], params: TensorDict
    ) -> tuple[Updates, dict[str, Any]]:
        new = dict(state)
        for i, name in enumerate(names):
            updates, new[name] = self.parts[name].update(updates, state[name], params)
            if updates.apply is not True and i + 1 < len(names):
                return self._run_where(updates, names[i + 1 :], new, params)
        return updates, new

    def _run_where(
        self, updates: Updates, rest: Sequence[str], state: dict[str, Any], params: TensorDict
    ) -> tuple[Updates, dict[str, Any]]:
        """Do the rest where `updates.apply`: not at all, or, as long as the host does not know, at no avail."""
        happens = updates.apply
        if not isinstance(happens, torch.Tensor):
            return updates, state
        before = params if updates.params is None else updates.params
        there = updates._replace(
            apply=True, donate=False
        )  # what was there is needed where it does not happen
        after, new = self._run(rest, there, state, params)
        made = None if after.params is None else choose(happens, after.params, before)
        kept = {
            name: choose(happens, new[name], state[name]) if name in rest else new[name]
            for name in new
        }
        return after._replace(
            params=made, apply=both(happens, after.apply), donate=updates.donate
        ), kept


def both(a: Flag, b: Flag) -> Flag:
    """Return whether both happen."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a & b
    if isinstance(a, torch.Tensor):
        return a if b else False
    return b if a else False


def _check_order(transformations: Sequence[GradientTransformation]) -> None:
    has_made = ""
    for each in transformations:
        if has_made and (each.makes_params or each.wants == "before"):
            raise OptimizerError(
                f"`{each.name}` cannot stand behind an optimizer of the same chain",
                got=f"`{each.name}` behind `{has_made}`",
                fix="put gradients first and one optimizer last, as in `chain(clip_by_global_norm(1.0), adamw(1e-3))`; "
                "use `partition` to give parts of a model optimizers of their own",
            )
        if each.wants == "after" and not has_made:
            raise OptimizerError(
                f"`{each.name}` needs new parameters, and no optimizer stands before it",
                got=f"`{each.name}` first",
                fix=f"write `chain(adamw(1e-3), {each.name}(...))`",
            )
        has_made = each.name if each.makes_params else has_made


Mask = Callable[[str, torch.Tensor], bool] | Mapping[str, bool] | Sequence[str]
Labels = Callable[[str, torch.Tensor], str] | Mapping[str, str]


def _chosen(mask: Mask, params: TensorDict) -> list[str]:
    tensors = named(params)
    if callable(mask):
        return [name for name, param in tensors.items() if mask(name, param)]
    if isinstance(mask, Mapping):
        for name in tensors.keys() ^ mask.keys():
            raise ConfigError(
                "a mask says of every parameter whether it is meant",
                got=f"`{name}` only in the {'mask' if name in mask else 'parameters'}",
                fix="name every parameter, or pass a function `(name, tensor) -> bool`",
            )
        return [name for name in tensors if mask[name]]
    patterns = [mask] if isinstance(mask, str) else mask
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in tensors):
            raise ConfigError(
                "a pattern matches no parameter", got=f"`{pattern}`", fix=nearest(pattern, tensors)
            )
    return [name for name in tensors if any(fnmatchcase(name, p) for p in patterns)]


def _part(tree: TensorDict, names: Sequence[str]) -> TensorDict:
    return tensordict({name: tree[name] for name in names})


def masked(inner: GradientTransformation, mask: Mask) -> GradientTransformation:
    """Return `inner` for some of the parameters; the others pass by it as they are.

    Effects: pure.

    Args:
        inner: Any transformation.
        mask: Which parameters: a function `(name, tensor) -> bool`, a bool for every name, or patterns such as
            `("blocks.*.weight",)`.

    Raises:
        ConfigError: Later, in `init`: the mask names what is not there.

    Examples:
        >>> from faccel.func import adamw, masked
        >>> no_biases = masked(adamw(1e-3), lambda name, param: param.ndim > 1)
        >>> sorted(no_biases.init(TensorDict({"w": torch.ones(2, 2), "b": torch.ones(2)}))["exp_avg"].keys())
        ['w']
    """

    _check_inner(inner)
    known_names: dict[
        tuple[Any, ...], list[str]
    ] = {}  # a mask is asked once for each model, not at every update

    def chosen(params: TensorDict) -> list[str]:
        key = tuple((name, each.shape) for name, each in params.items())
        if key not in known_names:
            known_names[key] = _chosen(mask, params)
        return known_names[key]

    def init(params: TensorDict) -> TensorDict:
        names = chosen(params)
        return inner.init(_part(params, names)) if names else tensordict({})

    def update(
        updates: Updates, state: TensorDict, params: TensorDict
    ) -> tuple[Updates, TensorDict]:
        names = chosen(params)
        if not names:
            return updates, state
        before = None if updates.params is None else _part(updates.params, names)
        here = updates._replace(grads=_part(updates.grads, names), params=before)
        after, state = inner.update(here, state, _part(params, names))
        made = updates.params
        if after.params is not None:
            made = tensordict(
                dict((params if made is None else made).items()) | dict(after.params.items())
            )
        grads = tensordict(dict(updates.grads.items()) | dict(after.grads.items()))
        return updates._replace(grads=grads, params=made, metrics=after.metrics), state

    return GradientTransformation(inner.name, init, update, inner.makes_params, inner.wants)


def partition(
    transformations: Mapping[str, GradientTransformation], labels: Labels
) -> GradientTransformation:
    """Return the transformation that treats each parameter by its label: param groups, as values.

    Effects: pure.

    Args:
        transformations: By label; each sees its own parameters only, a clipping inside, too.
        labels: The label of each parameter: a function `(name, tensor) -> str`, or a label for every name.

    Raises:
        ConfigError: Later, in `init`: a parameter has a label that is none of these.

    Examples:
        >>> from faccel.func import adamw, partition
        >>> groups = {"decay": adamw(1e-3, weight_decay=0.1), "rest": adamw(1e-3, weight_decay=0.0)}
        >>> optimizer = partition(groups, lambda name, param: "decay" if param.ndim > 1 else "rest")
        >>> state = optimizer.init(TensorDict({"w": torch.ones(2, 2), "b": torch.ones(2)}))
        >>> {label: sorted(state[label]["exp_avg"].keys()) for label in sorted(state.keys())}
        {'decay': ['w'], 'rest': ['b']}
    """

    def label_of(name: str, param: torch.Tensor) -> str:
        label = labels(name, param) if callable(labels) else labels.get(name, f"none, for `{name}`")
        if label not in transformations:
            raise ConfigError(
                "a parameter has a label for which there is no transformation",
                got=f"`{name}` with label `{label}`",
                fix=nearest(str(label), transformations),
            )
        return label

    def only(wanted: str) -> Mask:
        return lambda name, param: label_of(name, param) == wanted

    parts = {label: masked(each, only(label)) for label, each in transformations.items()}
    makes = {each.makes_params for each in parts.values()}
    if len(makes) > 1:
        without = sorted(label for label, each in parts.items() if not each.makes_params)
        raise OptimizerError(
            "some parameters would never be trained",
            got=f"no optimizer for `{'`, `'.join(without)}`",
            fix="put an optimizer behind it, `chain(clip_by_global_norm(1.0), adamw(1e-3))`, or write `frozen()`",
        )

    def init(params: TensorDict) -> TensorDict:
        return tensordict({label: each.init(params) for label, each in parts.items()})

    def update(
        updates: Updates, state: TensorDict, params: TensorDict
    ) -> tuple[Updates, TensorDict]:
        new: dict[str, Any] = {}
        for label, each in parts.items():
            updates, new[label] = each.update(updates, state[label], params)
        return updates, tensordict(new)

    return GradientTransformation(
        "partition", init, update, True in makes, "" if True in makes else "before"
    )


def frozen() -> GradientTransformation:
    """Return the optimizer that leaves parameters as they are, for `partition`.

    Effects: pure.

    Examples:
        >>> from faccel.func import adamw, frozen, partition
        >>> optimizer = partition({"head": adamw(1e-3), "body": frozen()}, lambda name, param: name.split(".")[0])
    """

    def update(
        updates: Updates, state: TensorDict, params: TensorDict
    ) -> tuple[Updates, TensorDict]:
        return updates._replace(params=params if updates.params is None else updates.params), state

    return GradientTransformation("frozen", empty, update, makes_params=True)
