"""A training run as one value: parameters, buffers, optimizer state and seed, in TensorDicts."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import NoReturn

import attrs
import torch
from tensordict import TensorDict
from torch import nn
from torch.utils._pytree import register_pytree_node

from faccel.comm.buckets import BUCKET_CAP_MB, assign_buckets, check_replicas
from faccel.comm.tensors import broadcast, reduce
from faccel.context import DistContext, require_context
from faccel.effects import COLLECTIVE, effectful
from faccel.errors import DesyncError, DonatedError, ModelError
from faccel.func.gradient_transformation import GradientTransformation, check_transformation
from faccel.func.loss import check_precision
from faccel.func.purity import digest
from faccel.func.tensordicts import NamedTensors, to_dict, to_tensordict
from faccel.training.precision import ScalerState, init_scaler
from faccel.tree import Tree

_TENSORDICT_FIELDS = ("params", "buffers", "opt")


class _Donated:
    """Replaces a TensorDict of a donated state; any use of it raises DonatedError.

    Args:
        name: Name of the field.
    """

    def __init__(self, name: str) -> None:
        self.__dict__["name"] = name

    def raise_error(self, *args: object, **kwargs: object) -> NoReturn:
        raise DonatedError(
            "this state was donated to a step, which has overwritten its tensors",
            got=f"`state.{self.__dict__['name']}` of the old state",
            fix="use the state that the step returned, as in "
            "`metrics, state = step(state, batch)`, or make the step with `donate=False`",
        )

    def __repr__(self) -> str:
        return "<donated>"

    def __getattr__(self, name: str) -> NoReturn:
        # Python looks up special methods on any object, for instance to copy or print it.
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        self.raise_error()

    # Special methods are looked up on the class, not by `__getattr__`.
    __getitem__ = __setitem__ = __iter__ = __len__ = __contains__ = __deepcopy__ = __reduce__ = (
        raise_error  # type: ignore[assignment]
    )


@attrs.frozen(eq=False, init=False, slots=False)
class TrainState:
    """A training run between two steps, as a value.

    `init_state` makes the first one, and each step returns the next one. `faccel.save` and
    `faccel.load` accept it, and `merge` makes a module of it. It is a pytree of its tensors, so
    `torch.vmap` and `torch.func.grad` accept it, too.

    Args:
        params: Trained parameters: a TensorDict of `T[...]` under the names that they have in the
            module, as in `state.params["conv.weight"]`.
        buffers: The model's buffers under their names, such as running means.
        opt: State of the gradient transformation.
        scaler: Loss scale of fp16; the identity for other precisions.
        step: Number of completed steps, int64[].
        seed: Seed of the random numbers of all steps, int64[].
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
        # Written out, because torch.compile cannot trace the `__init__` of a frozen attrs class.
        object.__setattr__(self, "params", params)
        object.__setattr__(self, "buffers", buffers)
        object.__setattr__(self, "opt", opt)
        object.__setattr__(self, "scaler", scaler)
        object.__setattr__(self, "step", step)
        object.__setattr__(self, "seed", seed)


def state_to_dict(state: TrainState) -> dict[str, Tree]:
    """Return the tensors of a state as nested dicts, which PyTorch's transforms accept."""
    return {
        "params": to_dict(state.params),
        "buffers": to_dict(state.buffers),
        "opt": to_dict(state.opt),
        "step": state.step,
        "seed": state.seed,
    }


def state_from_dict(
    tensors: Mapping[str, Tree], scaler: ScalerState, batch_size: Sequence[int] = ()
) -> TrainState:
    """Return the state with these tensors, `batch_size` of them stacked along dim 0."""
    return TrainState(
        to_tensordict(tensors["params"], batch_size),
        to_tensordict(tensors["buffers"], batch_size),
        to_tensordict(tensors["opt"], batch_size),
        scaler,
        tensors["step"],
        tensors["seed"],
    )


def _flatten(state: TrainState) -> tuple[list[Tree], tuple[tuple[str, ...], ScalerState]]:
    tensors = state_to_dict(state)
    # The scaler is static for PyTorch: a change of it compiles a new graph.
    return list(tensors.values()), (tuple(tensors), state.scaler)


def _unflatten(values: Iterable[Tree], context: tuple[tuple[str, ...], ScalerState]) -> TrainState:
    names, scaler = context
    return state_from_dict(dict(zip(names, values, strict=True)), scaler)


register_pytree_node(TrainState, _flatten, _unflatten)  # type: ignore[arg-type]


def check_state(state: object) -> None:
    """Raise unless `state` is a TrainState that was not donated."""
    if not isinstance(state, TrainState):
        raise ModelError(
            "`state` must be a `TrainState`",
            got=f"a {type(state).__name__}",
            fix="write `state = faccel.func.init_state(model, transformation, ctx, seed=0)`",
        )
    for name in _TENSORDICT_FIELDS:
        value = getattr(state, name)
        if isinstance(value, _Donated):
            value.raise_error()


def mark_donated(state: TrainState) -> None:
    """Make every later use of `state` an error."""
    for name in _TENSORDICT_FIELDS:
        # The only write to a frozen record: from here on it raises at every use.
        object.__setattr__(state, name, _Donated(name))


def _copy_to_device(tensors: Iterable[tuple[str, torch.Tensor]], ctx: DistContext) -> NamedTensors:
    copies: NamedTensors = {}
    for name, tensor in tensors:
        if tensor.is_meta:
            raise ModelError(
                "the model is on the meta device and has no values to make a state of",
                got=f"`{name}` on the meta device",
                fix="build the model on a real device, or materialize it first: "
                "`model.to_empty(device=ctx.device)`",
            )
        copies[name] = tensor.detach().to(ctx.device, copy=True)
    return copies


@effectful(COLLECTIVE)
def init_state(
    model: nn.Module, optimizer: GradientTransformation, ctx: DistContext, *, seed: int
) -> TrainState:
    """Return the first state: rank 0's parameters and buffers, and a new optimizer state.

    Effects: collective. The model is neither changed nor aliased.

    Parameters that require no gradient are constants: they stay in the model and are not part of
    the state. So are the buffers, for a loss function without `has_buffers`. Constants must be
    equal on all ranks, and on the model's device.

    Args:
        model: Any `torch.nn.Module` with values.
        optimizer: A gradient transformation, such as `adamw(1e-3)` or a `chain` that ends in one.
        ctx: The context; its mesh must have replicas only.
        seed: Seed of the random numbers of all steps: dropout masks, noise.

    Returns:
        A state on the device of `ctx`, equal on every rank.

    Raises:
        ConfigError: The mesh shards parameters or work.
        DesyncError: A constant of the model differs between ranks; names it.
        ModelError: The model has no parameter that requires a gradient, or has no values yet.
        OptimizerError: `optimizer` is no gradient transformation.

    Examples:
        >>> from faccel.func import adamw, init_state
        >>> from faccel.testing import fake_context
        >>> state = init_state(torch.nn.Linear(2, 1), adamw(1e-3), fake_context(0, 1), seed=0)
        >>> sorted(state.params.keys()), int(state.step)
        (['bias', 'weight'], 0)
    """
    require_context(ctx, "faccel.func.init_state(model, optimizer, ctx)")
    check_precision(ctx)
    check_replicas(ctx, "use `faccel.wrap` and `faccel.optimizer_step`, which train on every mesh")
    check_transformation(optimizer, "optimizer")
    ctx.comm.begin_call("init_state")
    # Tied parameters have one name here, as in `named_parameters`.
    trainable = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    if not trainable:
        raise ModelError(
            "the model has no parameter that requires a gradient",
            got=f"a {type(model).__name__} without trainable parameters",
            fix="pass a model with parameters, and call `requires_grad_()` on those to train",
        )
    params = _copy_to_device(trainable, ctx)
    buffers = _copy_to_device(model.named_buffers(), ctx)
    if ctx.data_world_size > 1:
        _check_constants(model, ctx)
        _broadcast_in_place(params, ctx)
        _broadcast_in_place(buffers, ctx)
    # The optimizer state is not broadcast: it is computed from equal parameters.
    params_dict = to_tensordict(params)
    return TrainState(
        params_dict,
        to_tensordict(buffers),
        optimizer.init(params_dict),
        init_scaler(ctx),
        # On the CPU: each step reads it to seed its generator.
        torch.zeros((), dtype=torch.int64),
        # Any Python int is accepted as a seed.
        torch.tensor(seed % 2**63, dtype=torch.int64),
    )


def _broadcast_in_place(tensors: NamedTensors, ctx: DistContext) -> None:
    """Replace all values by those of rank 0, bucket by bucket to limit the memory. Collective."""
    for names in assign_buckets(tensors, BUCKET_CAP_MB):
        tensors.update(broadcast({name: tensors[name] for name in names}, ctx))


def _check_constants(model: nn.Module, ctx: DistContext) -> None:
    """Raise if a constant differs between ranks: each rank would train another model. Collective.

    Raises:
        DesyncError: One differs; names it.
    """
    constants: NamedTensors = dict(model.named_buffers())
    for name, param in model.named_parameters():
        if not param.requires_grad:
            constants[name] = param
    if not constants:
        return
    # Below 2**62, so that the negative value fits into int64, too.
    hashes = [digest(tensor) % 2**62 for tensor in constants.values()]
    digests = torch.tensor(hashes, device=ctx.device)
    # max(x) = -min(-x), so that one all-reduce finds both extremes
    extremes = reduce({"low": digests, "high": -digests}, ctx, op="min")
    lows: list[int] = extremes["low"].tolist()
    highs: list[int] = extremes["high"].tolist()
    for name, low, high in zip(constants, lows, highs, strict=True):
        if low != -high:
            raise DesyncError(
                "a constant of the model differs between ranks",
                got=f"`{name}`",
                fix="build the model from one seed: `faccel.seed_everything(0, ctx)` before it",
            )


def merge(model: nn.Module, state: TrainState) -> nn.Module:
    """Return a copy of `model` with the parameters and buffers of `state`.

    Effects: pure. The result aliases neither of them. It is on the device of the state.

    Args:
        model: The module that the state was made of.
        state: Any state of its training run.

    Raises:
        DonatedError: `state` was donated.
        ModelError: Names or shapes of the two differ; names the leaf.

    Examples:
        >>> from faccel.func import init_state, merge, sgd
        >>> from faccel.testing import fake_context
        >>> model = torch.nn.Linear(2, 1)
        >>> state = init_state(model, sgd(0.1), fake_context(0, 1), seed=0)
        >>> bool((merge(model, state).weight == model.weight).all())
        True
    """
    check_state(state)
    # The user's module stays as it was, with its own values.
    merged = copy.deepcopy(model)
    targets: NamedTensors = {}
    for name, param in merged.named_parameters():
        if param.requires_grad:
            targets[name] = param
    targets |= dict(merged.named_buffers())
    values = to_dict(state.params) | to_dict(state.buffers)
    for name in targets.keys() ^ values.keys():
        owner = "the model" if name in targets else "the state"
        raise _other_model_error(f"`{name}` only in {owner}")
    for name, target in targets.items():
        value: torch.Tensor = values[name]
        if target.shape != value.shape:
            shapes = f"{tuple(target.shape)} in the model, {tuple(value.shape)} in the state"
            raise _other_model_error(f"`{name}`: {shapes}")
        # `data`, because a state may be on another device than the model
        target.data = value.detach().clone()
    return merged


def _other_model_error(got: str) -> ModelError:
    return ModelError(
        "the state belongs to another model",
        got=got,
        fix="pass the model that `init_state` made the state of",
    )
