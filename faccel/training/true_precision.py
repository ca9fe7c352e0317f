"""Parameters in 16 bits: `mixed_precision="bf16-true"` and `"fp16-true"`.

Parameters, gradients and optimizer states have the dtype, and so have floating point inputs. An
update that is smaller than half the distance to the next number of 16 bits is lost, unless the
optimizer rounds stochastically: up or down, with probabilities whose mean is the exact value.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from faccel.context import DistContext
from faccel.device_table import default_generator
from faccel.errors import ModelError
from faccel.random.hashing import mix
from faccel.tree import Tree, local_tensor, map_leaves

_logger = logging.getLogger(__name__)


def cast_module(module: nn.Module, ctx: DistContext) -> None:
    """Cast parameters and buffers to the dtype of the context, if it has one.

    Effects: updates module.

    Raises:
        ModelError: A parameter is complex.
    """
    if ctx.param_dtype is None:
        return
    for name, param in module.named_parameters():
        if param.is_complex():
            raise ModelError(
                f"`{name}` is complex, and there is no complex number of 16 bits",
                got=f"`{name}` of {param.dtype} under {ctx.config.mixed_precision}",
                fix='use `mixed_precision="bf16"`',
            )
    # In place: parameters stay the same objects.
    module.to(ctx.param_dtype)


def cast_inputs(
    args: tuple[Tree, ...], kwargs: Mapping[str, Tree], dtype: torch.dtype
) -> tuple[tuple[Tree, ...], dict[str, Tree]]:
    """Return arguments with their floating point tensors in `dtype`.

    Effects: pure.
    """

    def cast(leaf: object) -> object:
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
            return leaf.to(dtype)
        return leaf

    return tuple(map_leaves(cast, list(args))), map_leaves(cast, dict(kwargs))


def prepare_optimizer(opt: Optimizer, connected: Optimizer, ctx: DistContext) -> None:
    """Warn if `opt` loses small updates; make replicas round equally if it is stochastic.

    Effects: updates connected. Registers hooks of `Optimizer` around the step.

    Args:
        opt: The user's optimizer.
        connected: The optimizer to step with; another one under ZeRO-1.
        ctx: The context.
    """
    rounds = bool(getattr(opt, "bf16_stochastic_round", False))
    if rounds:
        rounding = _EqualRounding(ctx)
        connected.register_step_pre_hook(rounding.before_step)
        connected.register_step_post_hook(rounding.after_step)
    elif ctx.param_dtype is not None and ctx.is_main:
        _logger.warning(
            "%s rounds its updates to %s: those below about 1/%d of a parameter are lost. Use "
            "`torchao.optim._AdamW(params, bf16_stochastic_round=True)`, or "
            '`mixed_precision="bf16"`, which keeps parameters in fp32',
            type(opt).__name__,
            ctx.param_dtype,
            round(2 / torch.finfo(ctx.param_dtype).eps),
        )


class _EqualRounding:
    """Seeds the random numbers of each step equally on all ranks, and restores the generator after.

    Stochastic rounding draws from the default generator, whose state differs between ranks:
    replicas would drift apart.
    """

    def __init__(self, ctx: DistContext) -> None:
        self._ctx = ctx
        self._generator = torch.default_generator
        self._state: torch.Tensor | None = None

    def before_step(self, opt: Optimizer, args: object, kwargs: object) -> None:
        """Seed the generator of the parameters by the number of the step."""
        param = local_tensor(opt.param_groups[0]["params"][0].detach())
        self._generator = default_generator(param.device)
        self._state = self._generator.get_state()
        self._generator.manual_seed(mix(self._ctx.config.seed, _num_steps(opt)))

    def after_step(self, opt: Optimizer, args: object, kwargs: object) -> None:
        """Restore the state before the step."""
        if self._state is not None:
            self._generator.set_state(self._state)
            self._state = None


def _num_steps(opt: Optimizer) -> int:
    """Return the number of steps that are in the state of an optimizer, 0 for a new one."""
    # From the state, which a checkpoint restores: a resumed run rounds as an uninterrupted one. It
    # is on the host.
    for state in opt.state.values():
        step: Any = state.get("step", 0)
        return int(step)
    return 0
