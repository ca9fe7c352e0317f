"""Megatron-core's optimizer in PyTorch's form: the user's groups, and sharded states."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from faccel.backends.megatron.layout import Elements, ParamLayout
from faccel.backends.megatron.optimizer_checks import OPTIONS
from faccel.backends.param_groups import (
    check_same_sizes,
    copy_options,
    new_group_error,
    params_of,
)
from faccel.context import DistContext
from faccel.errors import ConfigError, OptimizerError, short_repr
from faccel.update_options import UpdateOptions

# The option of its parameter groups in which the number of the user's group is.
_NUMBER = "faccel_group"
_STATES = {"adam": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",)}
"""The states of an element, by the name of the algorithm in Megatron-core."""
_FIX_OF_GROUP = "train the model without `strategy`"


def create_optimizer(opt: Optimizer, chunks: Sequence[Any], ctx: DistContext) -> Any:
    """Return Megatron-core's optimizer with the groups of `opt`, for chunks inside its DDP.

    Effects: collective.
    """
    module: Any = importlib.import_module("megatron.core.optimizer")
    options = opt.defaults
    settings: dict[str, Any] = {
        "optimizer": _algorithm(opt),
        "lr": options["lr"],
        "weight_decay": options["weight_decay"],
        "bf16": ctx.compute_dtype == torch.bfloat16,
        "params_dtype": ctx.compute_dtype or torch.float32,
        "use_distributed_optimizer": ctx.config.zero == 1,
        # `step_engine` clips.
        "clip_grad": 0.0,
    }
    if isinstance(opt, torch.optim.SGD):
        settings["sgd_momentum"] = options["momentum"]
    # Its groups by default decay all parameters or none of the vectors, depending on the version.
    overrides: dict[Any, Any] = {}
    for number, group in enumerate(opt.param_groups):
        ids = {id(param) for param in group["params"]}
        # A group is a rule, which is asked for every parameter. Numbers keep the groups apart, and
        # equal on all stages, also where a stage has no parameter of one.
        predicate = module.ParamPredicate(f"group {number}", lambda p, ids=ids: id(p) in ids)
        override: dict[str, Any] = {_NUMBER: number}
        override |= {name: group[name] for name in OPTIONS[type(opt)]}
        overrides[module.ParamKey(predicate=predicate)] = override
    chained = module.get_megatron_optimizer(
        module.OptimizerConfig(**settings),
        list(chunks),
        config_overrides=overrides,
        use_gloo_process_groups=False,
    )
    # Several are for experts, which `wrap` refuses.
    (optimizer,) = chained.chained_optimizers
    return optimizer


def _algorithm(opt: Optimizer) -> str:
    if isinstance(opt, torch.optim.SGD):
        return "sgd"
    return "adam"


def main_params_of(optimizer: Any, layouts: Sequence[ParamLayout]) -> dict[int, Elements]:
    """Return the fp32 elements that the optimizer steps, by `id` of the parameter.

    Effects: pure.
    """
    elements: dict[int, Elements] = {}
    trained = [layout.param for layout in layouts if layout.param.requires_grad]
    # The distributed optimizer steps ranges of its buffers, which begin and end anywhere in a
    # parameter; the others step full parameters, or fp32 copies of them.
    if not hasattr(optimizer, "model_param_group_index_map"):  # not the distributed optimizer
        for param in trained:
            main = getattr(param, "main_param", None)
            if main is None:  # fp32
                main = param
            elements[id(param)] = Elements(main, 0, is_range=False)
        return elements
    # Without an entry below, the range of this rank has no element of the parameter.
    for param in trained:
        empty = torch.empty(0, dtype=torch.float32, device=param.device)
        elements[id(param)] = Elements(empty, 0, is_range=True)
    for param, main in _sharded_params(optimizer):
        start = optimizer._get_model_param_range_map(param)["param"].start
        elements[id(param)] = Elements(main, start, is_range=True)
    return elements


def _sharded_params(optimizer: Any) -> list[tuple[Any, torch.Tensor]]:
    """Return the parameters of which this rank has elements, with those."""
    pairs: list[tuple[Any, torch.Tensor]] = []
    for models, mains in (
        (optimizer.model_fp32_groups, optimizer.shard_fp32_groups),
        (optimizer.model_float16_groups, optimizer.shard_fp32_from_float16_groups),
    ):
        for model_group, main_group in zip(models, mains, strict=True):
            pairs += zip(model_group, main_group, strict=True)
    return pairs


class EngineOptimizer(Optimizer):
    """Steps through the optimizer of Megatron-core.

    Its state has the form of the user's optimizer, with sharded tensors, so a checkpoint of it
    loads on every mesh.

    Args:
        groups: Parameter groups of the user's optimizer.
        base: The user's optimizer.
        optimizer: That of Megatron-core.
        engine: The engine whose parameters it steps.
        ctx: The context.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        base: Optimizer,
        optimizer: Any,
        engine: Any,
        ctx: DistContext,
    ) -> None:
        # An `Optimizer`, so that schedulers of torch accept it. Its own `state` stays empty.
        super().__init__(groups, base.defaults)
        self.algorithm = _algorithm(base)
        self.optimizer = optimizer
        self.engine = engine
        self.num_steps = 0
        self._num_groups = len(groups)
        self._ctx = ctx

    def update(self, clip_norm: float | None, *, skip_nonfinite: bool) -> tuple[float | None, bool]:
        """Reduce the gradients, clip them and step; return their norm, and whether it stepped.

        Effects: updates the parameters; collective.
        """
        self._reduce_gradients()
        try:
            return self._clip_and_step(clip_norm, skip_nonfinite=skip_nonfinite)
        finally:
            # Also after an error in a hook: the next update would sum them over the ranks again.
            self.zero_grad()

    def _clip_and_step(
        self, clip_norm: float | None, *, skip_nonfinite: bool
    ) -> tuple[float | None, bool]:
        norm: float | None = None
        if clip_norm is not None or skip_nonfinite:
            # A limit of infinity measures and clips nothing.
            limit = math.inf if clip_norm is None else clip_norm
            norm = float(self.optimizer.clip_grad_norm(limit))
        # The norm is over all ranks, so all of them skip.
        steps = not skip_nonfinite or norm is None or math.isfinite(norm)
        if steps:
            # Hooks of the optimizer, and schedulers, expect a call of this method.
            self.step()
        return norm, steps

    def _reduce_gradients(self) -> None:
        self.engine.trained_params()  # raises where they have changed
        self.engine.reduce_gradients()
        # From the buffers of the DDP to `.grad` of what it steps.
        self.optimizer.prepare_grads()

    def _copy_options(self) -> None:
        # As in `opt.param_groups.append(...)`: nothing would step it.
        if len(self.param_groups) != self._num_groups:
            raise new_group_error("Megatron-core", _FIX_OF_GROUP)
        # Schedulers write the learning rate into the user's groups.
        for group in self.optimizer.param_groups:
            options = dict(self.param_groups[group[_NUMBER]])
            del options["params"]
            group.update(options)

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Reduce the gradients if `update` has not, step with them, and clear them. Collective."""
        if closure is not None:
            raise OptimizerError(
                "`closure` is unsupported under Megatron-core",
                got=short_repr(closure),
                fix="call `faccel.optimizer_step`",
            )
        if not self.engine.is_reduced:
            self._reduce_gradients()
        self._copy_options()
        self.optimizer.step_with_ready_grads()
        self.num_steps += 1
        self.zero_grad()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raise: Megatron-core has made its groups already."""
        # `Optimizer.__init__` adds the first ones, before there is an engine.
        if hasattr(self, "engine"):
            raise new_group_error("Megatron-core", _FIX_OF_GROUP)
        super().add_param_group(param_group)

    # the signature is torch's
    def zero_grad(self, set_to_none: bool = True) -> None:  # noqa: FBT001, FBT002
        """Clear the gradients, which are in buffers of the engine."""
        self.optimizer.zero_grad()
        self.engine.clear_gradients()

    def state_dict(self) -> dict[str, Any]:
        """Return options and states in torch's form; per-element states as this rank's shard."""
        state: dict[int, dict[str, Any]] = {}
        groups: list[dict[str, Any]] = []
        start = 0
        for group in self.param_groups:
            numbers = list(range(start, start + len(group["params"])))
            start += len(numbers)
            groups.append({**group, "params": numbers})
            for number, param in zip(numbers, group["params"], strict=True):
                param_state = self._state_of(param)
                if param_state:
                    state[number] = param_state
        return {"state": state, "param_groups": groups}

    def _state_of(self, param: torch.Tensor) -> dict[str, Any]:
        # Every rank has the same keys, also for a parameter of which it has no elements.
        state: dict[str, Any] = {}
        if not self.num_steps or not param.requires_grad:
            return state
        if self.algorithm == "adam":
            state["step"] = torch.tensor(float(self.num_steps))
        for name in _STATES[self.algorithm]:
            flat = self._flat_state(param, name)
            if flat is not None:
                state[name] = self.engine.view_of(param, flat)
        return state

    def _flat_state(self, param: torch.Tensor, name: str) -> torch.Tensor | None:
        """Return the elements of a state that this rank has; None for SGD without momentum."""
        elements = self.engine.main_params[id(param)]
        if not elements.flat.numel():
            return elements.flat
        value = self._inner_state(param).get(name)
        return value

    def _inner_state(self, param: torch.Tensor) -> dict[str, Any]:
        return self.optimizer.optimizer.state[self.engine.main_params[id(param)].flat]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load full tensors, or shards laid out as those of `state_dict()`."""
        saved_groups = state_dict["param_groups"]
        check_same_sizes(saved_groups, self.param_groups)
        copy_options(saved_groups, self.param_groups)
        inner = self.optimizer.optimizer
        # An optimizer that has stepped has states that the saved one may lack.
        inner.state.clear()
        self.num_steps = 0
        for param, number in zip(
            params_of(self.param_groups), params_of(saved_groups), strict=True
        ):
            state: Mapping[str, Any] = state_dict["state"].get(number, {})
            if param.requires_grad and state:
                self._load_param_state(param, state)

    def _load_param_state(self, param: torch.Tensor, state: Mapping[str, Any]) -> None:
        # Without a count, as SGD has none: at least one step.
        self.num_steps = int(state.get("step", 1))
        elements = self.engine.main_params[id(param)]
        # Its states are on the other data ranks.
        if not elements.flat.numel():
            return
        key = elements.flat
        inner = self.optimizer.optimizer
        for name in _STATES[self.algorithm]:
            if name in state:
                # New memory: the saved state may alias that of another optimizer.
                inner.state[key][name] = torch.zeros_like(key, requires_grad=False)
                self.engine.view_of(param, inner.state[key][name]).assign(state[name])
        self._set_step(inner, key)

    def _set_step(self, inner: Any, key: torch.Tensor) -> None:
        if self.algorithm == "sgd":
            return
        if isinstance(inner, torch.optim.AdamW):
            inner.state[key]["step"] = torch.tensor(float(self.num_steps))
            return
        # The fused optimizers of TransformerEngine and Apex count for each group.
        for group in inner.param_groups:
            group["step"] = self.num_steps


def step_engine(
    opt: Optimizer, options: UpdateOptions, ctx: DistContext
) -> tuple[torch.Tensor | None, bool]:
    """Clip and step through Megatron-core: `Parallelism.optimizer_step`."""
    if not isinstance(opt, EngineOptimizer):
        raise OptimizerError(
            "`opt` does not belong to an engine of Megatron-core",
            got=f"a {type(opt).__name__}",
            fix="write `opt = faccel.wrap_optimizer(opt, model, ctx)`",
        )
    _check_options_of_update(options)
    if not opt.engine.has_gradients:
        raise OptimizerError(
            "no parameter of `opt` has a gradient",
            got="no backward since the last step",
            fix="call `scaled_backward` on a loss of its model first",
        )
    clip_norm = None
    if options.clip_norm is not None:
        # Megatron-core computes the norm on the host: a tensor is read here.
        clip_norm = float(options.clip_norm)
    value, has_stepped = opt.update(clip_norm, skip_nonfinite=options.skip_nonfinite)
    if clip_norm is None or value is None:
        return None, has_stepped
    return torch.tensor(value, dtype=torch.float32, device=ctx.device), has_stepped


def _check_options_of_update(options: UpdateOptions) -> None:
    names: list[str] = []
    if options.norm_type != 2.0:
        names.append("norm_type")
    if options.clip_params is not None:
        names.append("clip_params")
    if options.clip_value is not None:
        names.append("clip_value")
    if names:
        raise ConfigError(
            f"`{names[0]}` is unsupported under Megatron-core, which clips by the 2-norm of all "
            "gradients",
            got=f"{', '.join(names)} in `optimizer_step`",
            fix="leave it out, and use `clip_norm`",
        )
