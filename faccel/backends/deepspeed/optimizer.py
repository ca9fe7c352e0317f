"""The optimizer of a ZeRO engine in PyTorch's form: the user's groups, and sharded states."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from faccel.backends.deepspeed.availability import rank_environment_if_missing
from faccel.backends.deepspeed.partition import ParamShard
from faccel.backends.param_groups import (
    check_same_sizes,
    copy_options,
    new_group_error,
    params_of,
)
from faccel.context import DistContext
from faccel.errors import ConfigError, OptimizerError, short_repr
from faccel.flat_shard import FlatShard
from faccel.update_options import UpdateOptions

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
"""Optimizers of torch that update each element independently.

They compute the same on one flat tensor as on the parameters that it consists of.
"""


_FIX_OF_GROUP = 'write `faccel.init(mesh="dp_shard=-1")`, without DeepSpeed'


def check_optimizer(opt: Optimizer, *, is_allowed: bool) -> None:
    """Raise for an optimizer whose update depends on the shapes of parameters, or has a scheduler.

    Effects: pure.

    Args:
        opt: The user's optimizer.
        is_allowed: Whether the user's settings allow an optimizer that is not listed.

    Raises:
        OptimizerError: It is not element-wise, or a scheduler already refers to it.
    """
    cls = type(opt)
    is_deepspeed = cls.__module__.startswith("deepspeed.ops.")
    is_listed = cls.__module__.startswith("torch.optim.") and cls.__name__ in ELEMENTWISE
    if not (is_deepspeed or is_listed or is_allowed):
        raise OptimizerError(
            "`opt` is not an element-wise optimizer, and DeepSpeed flattens all parameters into "
            "one tensor",
            got=f"a {cls.__module__}.{cls.__name__}",
            fix=f"use one of torch's {', '.join(ELEMENTWISE)}, or, if it updates each element "
            "independently, write "
            '`faccel.parallel.DeepSpeedConfig(settings={"zero_allow_untested_optimizer": True})`',
        )
    # torch's schedulers replace `step` of the optimizer that they are created with
    if hasattr(opt.step, "_wrapped_by_lr_sched"):
        raise OptimizerError(
            "a scheduler was created with `opt` before `wrap_optimizer`, so it would change "
            "another optimizer than the one that steps",
            got=f"a {cls.__name__}",
            fix="call `faccel.wrap_optimizer` first, and create the scheduler with its result",
        )


class ZeroOptimizer(Optimizer):
    """Steps through an engine of DeepSpeed.

    Its state has the form of the user's optimizer, with sharded tensors, so a checkpoint of it
    loads under every other strategy.

    Args:
        groups: Parameter groups of the user's optimizer, copied before the engine flattened them.
        base: The user's optimizer.
        engine: The engine of DeepSpeed.
        shards: This rank's shard of each parameter, by `id` of the parameter.
        ctx: The context.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        base: Optimizer,
        engine: Any,
        shards: Mapping[int, ParamShard],
        ctx: DistContext,
    ) -> None:
        # An `Optimizer`, so that schedulers of torch accept it. Its own `state` stays empty.
        super().__init__(groups, base.defaults)
        self.base = base
        self.engine = engine
        self._shards = shards
        self._ctx = ctx
        # Read once, because each step overwrites `clip_grad` of the engine's optimizer.
        self.configured_clip_norm = float(engine.gradient_clipping())
        self.has_gradients = False
        # First in the list: the engine's hook raises where several forwards precede one backward.
        engine.optimizer._grad_acc_post_hooks.insert(0, self._after_backward)

    def _after_backward(self) -> None:
        """Record that there are gradients, and reset the engine's count of nested backwards.

        DeepSpeed counts one for each forward that the backward went through.
        """
        self.has_gradients = True
        # Above 1 the engine takes the backward for an interrupted one.
        self.engine.optimizer._backward_active_depth = 1

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update with the gradients that the engine has reduced, and clear them. Collective."""
        if closure is not None:
            raise OptimizerError(
                "`closure` is unsupported under DeepSpeed",
                got=short_repr(closure),
                fix="call `faccel.optimizer_step`",
            )
        # As in `opt.param_groups.append(...)`, or where the user's optimizer has got the group.
        if len(self.param_groups) != len(self.base.param_groups):
            raise new_group_error("DeepSpeed", _FIX_OF_GROUP)
        # Schedulers write the learning rate into these groups, the engine reads those of `base`.
        copy_options(self.param_groups, self.base.param_groups)
        with rank_environment_if_missing(self._ctx):
            self.engine.step()
        self.has_gradients = False

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raise: the engine has flattened the parameters of all groups."""
        # `Optimizer.__init__` adds the first ones, before there is an engine.
        if hasattr(self, "engine"):
            raise new_group_error("DeepSpeed", _FIX_OF_GROUP)
        super().add_param_group(param_group)

    # the signature is torch's
    def zero_grad(self, set_to_none: bool = True) -> None:  # noqa: FBT001, FBT002
        """Clear the gradients that the engine has reduced and stored."""
        zero = self.engine.optimizer
        # It clears `.grad` of parameters. Reduced gradients are in private buffers, which `step`
        # clears after an overflow as they are cleared below.
        zero.zero_grad()
        if hasattr(zero, "all_grad_tensors"):  # ZeRO-1 and ZeRO-2
            # The value before the first backward, which overwrites the buffers; later ones add.
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
        """Return options and states in torch's form; per-element states as this rank's shard."""
        # The engine's `state_dict` has the flat tensors, which depend on the number of ranks.
        state: dict[int, dict[str, Any]] = {}
        packed_groups: list[dict[str, Any]] = []
        start = 0
        for group in self.param_groups:
            params = group["params"]
            numbers = list(range(start, start + len(params)))
            start += len(params)
            packed_groups.append({**group, "params": numbers})
            for number, param in zip(numbers, params, strict=True):
                param_state = self._sharded_state(self._shards.get(id(param)))
                if param_state:
                    state[number] = param_state
        return {"state": state, "param_groups": packed_groups}

    def _sharded_state(self, shard: ParamShard | None) -> dict[str, Any]:
        if shard is None or shard.flat not in self.base.state:
            return {}
        sharded: dict[str, Any] = {}
        for name, value in self.base.state[shard.flat].items():
            sharded[name] = value
            # States such as `step` are not per element, so they are equal on all ranks.
            if _has_shape_of_flat(value, shard):
                sharded[name] = shard.view_of(value, self._ctx)
        return sharded

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load full tensors, or shards laid out as those of `state_dict()`."""
        saved_groups = state_dict["param_groups"]
        check_same_sizes(saved_groups, self.param_groups)
        copy_options(saved_groups, self.param_groups)
        # Cleared, because an optimizer that has stepped has states that the saved one may lack.
        self.base.state.clear()
        # A state numbers parameters in the order of the groups.
        for param, number in zip(
            params_of(self.param_groups), params_of(saved_groups), strict=True
        ):
            # A parameter without a shard is frozen: it has no master weights and no state.
            shard = self._shards.get(id(param))
            if shard is not None:
                self._load_param_state(shard, state_dict["state"].get(number, {}))
        zero = self.engine.optimizer
        if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
            # parameters of ZeRO-1 and 2 refer to the state tensors, which are new ones now
            zero._hp_optimizer_states_linked = False
            if self.base.state:
                zero._lazy_init_hp_params_optimizer_state()

    def _load_param_state(self, shard: ParamShard, state: Mapping[str, Any]) -> None:
        # `base.state` makes an entry for a key that it lacks, and an empty one counts as a state.
        if not state:
            return
        flat_state = self.base.state[shard.flat]
        for name, value in state.items():
            is_per_element = isinstance(value, torch.Tensor) and value.shape == shard.shape
            # `step` of a 0-d parameter has the parameter's shape
            if name == "step" or not is_per_element:
                flat_state[name] = value
                continue
            if name not in flat_state:
                flat_state[name] = torch.zeros_like(shard.flat, dtype=value.dtype)
            shard.view_of(flat_state[name], self._ctx).assign(value)


def _has_shape_of_flat(value: object, shard: ParamShard) -> bool:
    if not isinstance(value, torch.Tensor) or isinstance(value, FlatShard):
        return False
    return value.shape == shard.flat.shape


def step_engine(
    opt: Optimizer, options: UpdateOptions, ctx: DistContext
) -> tuple[torch.Tensor | None, bool]:
    """Clip and step through the engine: `Parallelism.optimizer_step`."""
    if not isinstance(opt, ZeroOptimizer):
        raise OptimizerError(
            "`opt` does not belong to an engine of DeepSpeed",
            got=f"a {type(opt).__name__}",
            fix="write `opt = faccel.wrap_optimizer(opt, model, ctx)`",
        )
    if not opt.has_gradients:
        raise OptimizerError(
            "no parameter of `opt` has a gradient",
            got="no backward since the last step",
            fix="call `scaled_backward` on a loss of its model first",
        )
    _check_norm(options)
    zero = opt.engine.optimizer
    zero.clip_grad = _clip_norm(options, opt.configured_clip_norm)
    # Gradients are of scale * loss: the engine divides them by the scale, and then clips.
    zero.loss_scale = options.grad_scale
    # All ranks skip the step if one gradient is not finite.
    zero.check_grad_overflow = options.skip_nonfinite
    opt.step()
    zero.loss_scale = 1.0
    norm = None
    if options.clip_norm is not None:
        norm = torch.as_tensor(zero._global_grad_norm, dtype=torch.float32, device=ctx.device)
    return norm, not zero.overflow


def _check_norm(options: UpdateOptions) -> None:
    if options.norm_type != 2.0 or options.clip_params is not None:
        raise ConfigError(
            "`norm_type` and `clip_params` are unsupported under DeepSpeed, which clips by the "
            "2-norm of all gradients",
            got=f"norm_type={options.norm_type}, clip_params={options.clip_params is not None}",
            fix="leave them out",
        )


def _clip_norm(options: UpdateOptions, configured: float) -> float:
    """Return the limit of the norm; 0 clips nothing."""
    if options.clip_value is not None:
        raise ConfigError(
            "`clip_value` is unsupported under DeepSpeed, which clips by the norm only",
            got=f"clip_value={options.clip_value}",
            fix="leave `clip_value` out, and use `clip_norm`",
        )
    if options.clip_norm is None:
        # Without a limit in the script, that of the settings applies: 0 if they have none.
        return configured
    # DeepSpeed computes the norm on the host: a tensor is read here.
    clip_norm = float(options.clip_norm)
    if configured and clip_norm != configured:
        raise ConfigError(
            "`clip_norm` contradicts `gradient_clipping` of the DeepSpeed settings",
            got=f"clip_norm={clip_norm}, `gradient_clipping` {configured}",
            fix="leave one of them out",
        )
    return clip_norm
