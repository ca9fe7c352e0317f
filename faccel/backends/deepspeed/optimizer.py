"""The optimizer of a ZeRO engine, as torch's: groups with the user's parameters, and states under their numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from faccel.backends.deepspeed.availability import rank_environment_if_missing
from faccel.backends.deepspeed.partition import Place
from faccel.context import DistContext
from faccel.errors import ConfigError, OptimizerError
from faccel.flat_shard import FlatShard
from faccel.protocols import UpdateOptions

ELEMENTWISE = (
    "ASGD",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "NAdam",
    "RAdam",
    "RMSprop",
    "Rprop",
    "SGD",
)
"""Those of torch that treat each element on its own, so that they may see a model as one flat tensor."""


def check_optimizer(opt: Optimizer, *, is_allowed: bool) -> None:
    """Refuse an optimizer that would silently compute something else on flat memory, or that a scheduler holds."""
    kind = type(opt)
    is_known = kind.__module__.startswith(("torch.optim.", "deepspeed.ops.")) and (
        kind.__module__.startswith("deepspeed.") or kind.__name__ in ELEMENTWISE
    )
    if not is_known and not is_allowed:
        raise OptimizerError(
            "ZeRO shows an optimizer all parameters as one flat tensor, and this one may look at their shapes",
            got=f"a {kind.__module__}.{kind.__name__}",
            fix=f"use one of torch's {', '.join(ELEMENTWISE)}, or, if each element moves on its own, write "
            '`faccel.parallel.DeepSpeedConfig(settings={"zero_allow_untested_optimizer": True})`',
        )
    if hasattr(opt.step, "_wrapped_by_lr_sched"):
        raise OptimizerError(
            "a scheduler holds this optimizer already, and would not move the one that steps",
            got=f"a {kind.__name__}",
            fix="call `faccel.wrap_optimizer` first, and make the scheduler from what it returns",
        )


class ZeroOptimizer(Optimizer):
    """Steps through an engine of DeepSpeed.

    Its state is that of the optimizer that it was made from, of which each rank holds a part, so that a checkpoint
    loads wherever one of torch's optimizer does.

    Args:
        groups: Those of the user's optimizer, from before the engine flattened them.
        base: The user's optimizer.
        engine: Of DeepSpeed.
        places: Where parameters lie, by identity.
        ctx: The world.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        base: Optimizer,
        engine: Any,
        places: Mapping[int, Place],
        ctx: DistContext,
    ) -> None:
        super().__init__(groups, base.defaults)
        self.base, self.engine, self._places, self._ctx = base, engine, places, ctx
        self.limit = float(engine.gradient_clipping())
        self.has_gradients = False
        # before the engine's own, which gives up where it has been entered twice
        engine.optimizer._grad_acc_post_hooks.insert(0, self._end_of_backward)

    def _end_of_backward(self) -> None:
        """Note that there are gradients. The engine was entered once for each forward that backward went through."""
        self.has_gradients = True
        self.engine.optimizer._backward_active_depth = 1

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step, with the gradients that the engine has reduced, and forget them. Collective."""
        if closure is not None:
            raise OptimizerError(
                "an engine takes no closure", got=repr(closure), fix="call `faccel.optimizer_step`"
            )
        for mine, other in zip(self.param_groups, self.base.param_groups, strict=True):
            other.update({name: value for name, value in mine.items() if name != "params"})
        with rank_environment_if_missing(self._ctx):
            self.engine.step()
        self.has_gradients = False

    def zero_grad(self, set_to_none: bool = True) -> None:  # noqa: FBT001, FBT002 (torch's own signature)
        """Forget the gradients that the engine has reduced and kept."""
        zero = self.engine.optimizer
        zero.zero_grad()
        if hasattr(zero, "all_grad_tensors"):  # ZeRO-1 and 2
            zero.micro_step_id = -1
            zero._release_preflattened_grad_buffers()
            for group in range(len(zero.bit16_groups)):
                zero.averaged_gradients[group] = zero.all_grad_tensors[group] = None
            if zero.cpu_offload:
                zero.reset_cpu_buffers()
                zero._offload_accumulated_param_ids = set()
        else:
            zero._offload_boundary_param_ids = set()
        self.has_gradients = False

    def state_dict(self) -> dict[str, Any]:
        """Return options and states in torch's form; what is as large as a parameter is this rank's part of it."""
        state: dict[int, dict[str, Any]] = {}
        packed: list[dict[str, Any]] = []
        for group in self.param_groups:
            start = sum(len(each["params"]) for each in packed)
            numbers = list(range(start, start + len(group["params"])))
            packed.append({**group, "params": numbers})
            for number, p in zip(numbers, group["params"], strict=True):
                mine = self._state_of(self._places.get(id(p)))
                if mine:
                    state[number] = mine
        return {"state": state, "param_groups": packed}

    def _state_of(self, place: Place | None) -> dict[str, Any]:
        if place is None or place.flat not in self.base.state:
            return {}
        return {
            name: place.shard(value, self._ctx) if _is_flat(value, place) else value
            for name, value in self.base.state[place.flat].items()
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take options and states: whole tensors, or parts that lie as those of `state_dict` do."""
        saved = state_dict["param_groups"]
        if [len(group["params"]) for group in saved] != [
            len(group["params"]) for group in self.param_groups
        ]:
            raise OptimizerError(
                "this state is of an optimizer with other groups of parameters",
                got=f"groups of {[len(group['params']) for group in saved]}",
                fix="make the optimizer from the model that the state belongs to, in the same groups",
            )
        self.base.state.clear()
        for mine, other in zip(self.param_groups, saved, strict=True):
            mine.update({name: value for name, value in other.items() if name != "params"})
            for p, number in zip(mine["params"], other["params"], strict=True):
                place = self._places.get(id(p))
                if place is not None:
                    self._take(place, state_dict["state"].get(number, {}))
        zero = self.engine.optimizer
        if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
            zero._hp_optimizer_states_linked = False
            if self.base.state:
                zero._lazy_init_hp_params_optimizer_state()

    def _take(self, place: Place, state: Mapping[str, Any]) -> None:
        for name, value in state.items():
            own = self.base.state[place.flat]
            if name == "step" or not isinstance(value, torch.Tensor) or value.shape != place.shape:
                own[name] = value
                continue
            if name not in own:
                own[name] = torch.zeros_like(place.flat, dtype=value.dtype)
            place.shard(own[name], self._ctx).assign(value)


def _is_flat(value: Any, place: Place) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and not isinstance(value, FlatShard)
        and value.shape == place.flat.shape
    )


def step_engine(
    opt: Optimizer, options: UpdateOptions, ctx: DistContext
) -> tuple[torch.Tensor | None, bool]:
    """Clip and step through the engine; `Parallelism.optimizer_step`."""
    if not isinstance(opt, ZeroOptimizer):
        fix = "write `opt = faccel.wrap_optimizer(opt, model, ctx)`"
        raise OptimizerError(
            "this optimizer is tied to no engine", got=f"a {type(opt).__name__}", fix=fix
        )
    if not opt.has_gradients:
        fix = "call `scaled_backward` on a loss of its model first"
        raise OptimizerError(
            "no gradient has reached a parameter of this optimizer", got="no backward", fix=fix
        )
    zero = opt.engine.optimizer
    zero.clip_grad = _limit(options, opt.limit)
    zero.loss_scale, zero.check_grad_overflow = options.grad_scale, options.skip_nonfinite
    opt.step()
    zero.loss_scale = 1.0
    norm = None
    if options.clip_norm is not None:
        norm = torch.as_tensor(zero._global_grad_norm, dtype=torch.float32, device=ctx.device)
    return norm, not zero.overflow


def _limit(options: UpdateOptions, configured: float) -> float:
    if options.clip_value is not None:
        fix = "leave `clip_value` out, and use `clip_norm`"
        raise ConfigError(
            "DeepSpeed clips gradients by their norm only",
            got=f"clip_value={options.clip_value}",
            fix=fix,
        )
    if options.clip_norm is not None and configured and options.clip_norm != configured:
        got = f"clip_norm={options.clip_norm}, and `gradient_clipping` {configured} of the DeepSpeed settings"
        raise ConfigError(
            "two limits of the gradients contradict each other",
            got=got,
            fix="leave one of them out",
        )
    return configured if options.clip_norm is None else options.clip_norm
