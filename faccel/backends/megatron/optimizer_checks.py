"""Whether Megatron-core has the optimizer of a user, and steps what it steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch.optim import Optimizer

from faccel.backends.param_groups import check_no_scheduler, params_of
from faccel.context import DistContext
from faccel.errors import OptimizerError, short_repr

OPTIONS: Mapping[type[Optimizer], tuple[str, ...]] = {
    torch.optim.AdamW: ("lr", "betas", "eps", "weight_decay"),
    torch.optim.SGD: ("lr", "momentum", "weight_decay"),
}
"""The options that Megatron-core's optimizers have, too."""

_CHOICES_OF_KERNELS = ("foreach", "fused", "capturable")


def check_optimizer(opt: Optimizer, trained: Sequence[torch.Tensor], ctx: DistContext) -> None:
    """Raise unless Megatron-core has the user's optimizer, and it steps all trained parameters.

    Effects: pure.

    Raises:
        OptimizerError: It is neither AdamW nor SGD, has another option, leaves a parameter out, or
            has been used already. Or there is no trained parameter.
    """
    if type(opt) not in OPTIONS:
        raise OptimizerError(
            "Megatron-core has no optimizer that computes what `opt` does",
            got=f"a {type(opt).__module__}.{type(opt).__name__}",
            fix="use `torch.optim.AdamW` or `torch.optim.SGD`",
        )
    # It asserts this itself, without a fix.
    if ctx.config.zero == 1 and type(opt) is not torch.optim.AdamW:
        raise OptimizerError(
            "the distributed optimizer of Megatron-core is for AdamW only",
            got=f"zero=1, a {type(opt).__name__}",
            fix="use `torch.optim.AdamW`, or leave `zero` out",
        )
    _check_options(opt)
    check_no_scheduler(opt)
    if opt.state:
        raise OptimizerError(
            "`opt` has stepped before `wrap_optimizer`, and its state would be lost",
            got=f"a {type(opt).__name__} with states of {len(opt.state)} parameters",
            fix="make a new optimizer, and load its state after `faccel.wrap_optimizer`",
        )
    # Its DDP and its optimizer fail for a rank without one.
    if not trained:
        raise OptimizerError(
            "no parameter of this rank requires gradients, and Megatron-core steps every stage",
            got=f"a {type(opt).__name__}, and a frozen model or pipeline stage",
            fix="train a parameter of each stage, or leave the optimizer of a frozen model out",
        )
    stepped = {id(param) for param in params_of(opt.param_groups)}
    missing = {id(param) for param in trained} - stepped
    if missing:
        raise OptimizerError(
            "`opt` leaves out parameters that require gradients, and Megatron-core has one "
            "optimizer for a model",
            got=f"{len(missing)} of {len(trained)} parameters left out",
            fix="freeze them before `faccel.wrap`, or put them into a group",
        )


def _check_options(opt: Optimizer) -> None:
    """Raise for an option that differs from the default of PyTorch, and that Megatron lacks."""
    known = (*OPTIONS[type(opt)], *_CHOICES_OF_KERNELS, "params", "initial_lr")
    # Every option is checked, also a new one of PyTorch: the user would believe that it works.
    for group in opt.param_groups:
        for name, value in group.items():
            # AdamW is Adam with this option.
            is_default = name == "decoupled_weight_decay" or not value
            if name not in known and not is_default:
                raise OptimizerError(
                    f"`{name}` is unsupported under Megatron-core",
                    got=f"{name}={short_repr(value)} of a {type(opt).__name__}",
                    fix=f"leave it out: the options are {', '.join(OPTIONS[type(opt)])}",
                )
            if isinstance(value, torch.Tensor):
                raise OptimizerError(
                    f"`{name}` must be a number under Megatron-core",
                    got="a tensor",
                    fix=f"write `{name}={value.item() if value.numel() == 1 else 0.1}`",
                )
