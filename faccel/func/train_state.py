"""What training is, as one value: parameters, buffers, the optimizer's state and the seed, in TensorDicts."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import attrs
import torch
from tensordict import TensorDict
from torch import nn
from torch.utils._pytree import register_pytree_node

from faccel.comm.buckets import BUCKET_CAP_MB, check_replicas, packed
from faccel.comm.tensors import broadcast, reduce
from faccel.context import DistContext
from faccel.effects import COLLECTIVE, effectful
from faccel.errors import DesyncError, DonatedError, ModelError
from faccel.func.gradient_transformation import GradientTransformation, check_transformation
from faccel.func.purity import digest
from faccel.func.tensordicts import plain, tensordict
from faccel.training.precision import ScalerState, init_scaler


class _Donated:
    """Stands where a state had what it gave away; any use of it is an error.

    Args:
        name: Which field of the state it was.
    """

    def __init__(self, name: str) -> None:
        self.__dict__["name"] = name

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise DonatedError(
            "this state was donated to a step, which has written the next state into its storage",
            got=f"`state.{self.__dict__['name']}` of the old state",
            fix="go on with the state that the step returned, as in `metrics, state = step(state, batch)`, or make the "
            "step with `donate=False`",
        )

    def __repr__(self) -> str:
        return "<donated>"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):  # what Python itself asks of any object
            raise AttributeError(name)
        return self._refuse()

    __getitem__ = __setitem__ = __iter__ = __len__ = __contains__ = __deepcopy__ = __reduce__ = (
        _refuse  # type: ignore[assignment]
    )


@attrs.frozen(eq=False, init=False, slots=False)
class TrainState:
    """A training run at one moment, as a value; `init_state` makes the first one, each step a new one.

    `faccel.save` and `faccel.load` take it as it is, and `merge` makes a module of it. torch's `vmap` and `grad` take
    it, too: it is a pytree of its tensors.

    Args:
        params: What is trained: a TensorDict of `T[...]` under torch's names, as in `state.params["conv.weight"]`.
        buffers: The model's buffers under their names, such as running means.
        opt: State of the gradient transformation.
        scaler: The loss scale of fp16; the identity for the other precisions.
        step: How many steps have been made, int64[].
        seed: What the random streams of the steps are made from, int64[].
    """

    params: TensorDict
    buffers: TensorDict
    opt: TensorDict
    scaler: ScalerState
    step: torch.Tensor
    seed: torch.Tensor

    def __init__(
        self,
        params: TensorDict,
        buffers: TensorDict,
        opt: TensorDict,
        scaler: ScalerState,
        step: torch.Tensor,
        seed: torch.Tensor,
    ) -> None:
        # written out, because torch.compile cannot see through the `__init__` that attrs makes for a frozen class
        object.__setattr__(self, "params", params)
        object.__setattr__(self, "buffers", buffers)
        object.__setattr__(self, "opt", opt)
        object.__setattr__(self, "scaler", scaler)
        object.__setattr__(self, "step", step)
        object.__setattr__(self, "seed", seed)


def leaves_of(state: TrainState) -> dict[str, Any]:
    """Return the tensors of a state as nested dicts, for torch's transforms."""
    return {
        "params": plain(state.params),
        "buffers": plain(state.buffers),
        "opt": plain(state.opt),
        "step": state.step,
        "seed": state.seed,
    }


def state_of(
    leaves: Mapping[str, Any], scaler: ScalerState, batch_size: Sequence[int] = ()
) -> TrainState:
    """Return the state with these tensors; of several stacked ones, `batch_size` is how many."""
    return TrainState(
        tensordict(leaves["params"], batch_size),
        tensordict(leaves["buffers"], batch_size),
        tensordict(leaves["opt"], batch_size),
        scaler,
        leaves["step"],
        leaves["seed"],
    )


def _flatten(state: TrainState) -> tuple[list[Any], tuple[Any, ...]]:
    leaves = leaves_of(state)
    return list(leaves.values()), (tuple(leaves), state.scaler)


def _unflatten(values: Any, context: tuple[Any, ...]) -> TrainState:
    names, scaler = context
    return state_of(dict(zip(names, values, strict=True)), scaler)


register_pytree_node(TrainState, _flatten, _unflatten)


def check_state(state: Any) -> None:
    """Refuse what is no state, and one that was donated."""
    if not isinstance(state, TrainState):
        raise ModelError(
            "a step takes a `TrainState`",
            got=f"a {type(state).__name__}",
            fix="write `state = faccel.func.init_state(model, transformation, ctx, seed=0)`",
        )
    for name in ("params", "buffers", "opt"):
        part = getattr(state, name)
        if isinstance(part, _Donated):
            part._refuse()  # pyright: ignore[reportPrivateUsage]


def donate(state: TrainState) -> None:
    """Make every later use of `state` an error."""
    for name in ("params", "buffers", "opt"):
        object.__setattr__(state, name, _Donated(name))


def _copied(named: Any, ctx: DistContext) -> dict[str, torch.Tensor]:
    copied: dict[str, torch.Tensor] = {}
    for name, tensor in named:
        if tensor.is_meta:
            raise ModelError(
                "a state is made of values, and this model has none yet",
                got=f"`{name}` on the meta device",
                fix="build the model on a real device, or materialize it first: `model.to_empty(device=ctx.device)`",
            )
        copied[name] = tensor.detach().to(ctx.device, copy=True)
    return copied


@effectful(COLLECTIVE)
def init_state(
    model: nn.Module, optimizer: GradientTransformation, ctx: DistContext, *, seed: int
) -> TrainState:
    """Return the state to start from: rank 0's values of the parameters and buffers of `model`, and a fresh optimizer.

    Effects: collective. The model is neither changed nor aliased.

    Parameters that require no gradient are constants: they stay in the model, and are no part of the state. So are the
    buffers, for a loss function that takes none. They must be the same on every rank, and on its device.

    Args:
        model: Any module of torch's, with values.
        optimizer: A gradient transformation, such as `adamw(1e-3)` or a `chain` that ends in one.
        ctx: The world; its mesh has replicas only.
        seed: What the random streams of all steps are made from: dropout masks, noise.

    Returns:
        A state on the device of `ctx`, equal on every rank.

    Raises:
        ConfigError: The mesh shares parameters or work between its ranks.
        DesyncError: A constant of the model differs between ranks; names it.
        ModelError: Nothing in the model is trained, or it has no values yet.
        OptimizerError: `optimizer` is no gradient transformation.

    Examples:
        >>> from faccel.func import adamw, init_state
        >>> from faccel.testing import fake_context
        >>> state = init_state(torch.nn.Linear(2, 1), adamw(1e-3), fake_context(0, 1), seed=0)
        >>> sorted(state.params.keys()), int(state.step)
        (['bias', 'weight'], 0)
    """
    check_replicas(ctx, "use `faccel.wrap` and `faccel.optimizer_step`, which train on every mesh")
    check_transformation(optimizer)
    params = _copied(((name, p) for name, p in model.named_parameters() if p.requires_grad), ctx)
    if not params:
        raise ModelError(
            "nothing in this model is trained",
            got=f"a {type(model).__name__} without a parameter that requires a gradient",
            fix="pass a model with parameters, and set `requires_grad_()` on those to be trained",
        )
    buffers = _copied(model.named_buffers(), ctx)
    if ctx.data_world_size > 1:
        _check_constants(model, ctx)
        for each in (params, buffers):
            for names in packed(each, BUCKET_CAP_MB):
                each.update(broadcast({name: each[name] for name in names}, ctx))
    held = tensordict(params)
    return TrainState(
        held,
        tensordict(buffers),
        optimizer.init(held),
        init_scaler(ctx),
        torch.zeros((), dtype=torch.int64),
        torch.tensor(seed % 2**63, dtype=torch.int64),
    )


def _check_constants(model: nn.Module, ctx: DistContext) -> None:
    """Refuse constants that differ between ranks, whose losses would then be those of several models."""
    constants = {n: p for n, p in model.named_parameters() if not p.requires_grad} | dict(
        model.named_buffers()
    )
    if not constants:
        return
    digests = torch.tensor([digest(each) % 2**62 for each in constants.values()], device=ctx.device)
    extremes = reduce({"low": digests, "high": -digests}, ctx, op="min")
    for name, low, high in zip(
        constants, extremes["low"].tolist(), extremes["high"].tolist(), strict=True
    ):
        if low != -high:
            raise DesyncError(
                "a constant of the model differs between ranks",
                got=f"`{name}`",
                fix="build the model from one seed: `faccel.seed_everything(0, ctx)` before it",
            )


def merge(model: nn.Module, state: TrainState) -> nn.Module:
    """Return a copy of `model` with the parameters and buffers of `state`.

    Effects: pure. Neither the model nor the state is changed or aliased. The copy is on the device of the state.

    Args:
        model: The module that the state was made of.
        state: Any state of its run.

    Raises:
        ModelError: They do not fit; names the leaf.

    Examples:
        >>> from faccel.func import init_state, merge, sgd
        >>> from faccel.testing import fake_context
        >>> model = torch.nn.Linear(2, 1)
        >>> state = init_state(model, sgd(0.1), fake_context(0, 1), seed=0)
        >>> bool((merge(model, state).weight == model.weight).all())
        True
    """
    check_state(state)
    merged = copy.deepcopy(model)
    own = {name: p for name, p in merged.named_parameters() if p.requires_grad}
    values = plain(state.params) | plain(state.buffers)
    own |= dict(merged.named_buffers())
    for name in own.keys() ^ values.keys():
        where = "the model" if name in own else "the state"
        raise ModelError(
            "the state is not one of this model",
            got=f"`{name}` only in {where}",
            fix="pass the model it was made of",
        )
    for name, mine in own.items():
        if mine.shape != values[name].shape:
            raise ModelError(
                "the state is not one of this model",
                got=f"`{name}`: {tuple(mine.shape)} in the model, {tuple(values[name].shape)} in the state",
                fix="pass the model it was made of",
            )
        mine.data = values[name].detach().clone()
    return merged
