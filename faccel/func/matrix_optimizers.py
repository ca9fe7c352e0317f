"""Optimizers that treat matrices in another way than vectors: Adafactor and Muon.

Options that are not described have the meaning and default that they have in `torch.optim`.
"""

from __future__ import annotations

from typing import Any

import torch

import faccel.func.formulas as formulas
from faccel.checks import one_of
from faccel.errors import OptimizerError
from faccel.func.formulas import Slots
from faccel.func.gradient_transformation import GradientTransformation
from faccel.func.optimizer_factory import Algorithm, KernelArguments, make_optimizer
from faccel.func.schedules import Schedule


def adafactor(
    lr: float | Schedule = 1e-2,
    *,
    beta2_decay: float = -0.8,
    eps: tuple[float | None, float] = (None, 1e-3),
    d: float = 1.0,
    weight_decay: float = 0.0,
    maximize: bool = False,
    foreach: bool | None = None,
) -> GradientTransformation:
    """Adafactor (Shazeer and Stern, 2018): `torch.optim.Adafactor`.

    Second moments of a matrix `[n, m]` are stored as rows `[n, 1]` and columns `[1, m]`.

    Effects: pure.

    Args:
        lr: Upper limit of the relative step size, or a schedule of it over the number of updates.
        beta2_decay: The decay rate of update `t`, from 1, is `1 - t**beta2_decay`; at most 0.
        eps: Limits from below for second moments and for the scale of a parameter. The first one
            is the epsilon of the dtype where it is None.
        d: Limit from above for the root mean square of an update, at least 1.
        weight_decay: Parameters are multiplied by `1 - lr * weight_decay` before each update.
        maximize: Whether to maximize the loss.
        foreach: Whether to use the kernel over lists of tensors; None lets PyTorch choose.

    Raises:
        ConfigError: An option is out of range.
        OptimizerError: In `init`: a parameter is complex.

    Examples:
        >>> from tensordict import TensorDict
        >>> from faccel.func import adafactor
        >>> state = adafactor().init(TensorDict({"w": torch.ones(2, 3), "b": torch.ones(3)}))
        >>> state["row_var"]["w"].shape, state["col_var"]["w"].shape, state["variance"]["b"].shape
        (torch.Size([2, 1]), torch.Size([1, 3]), torch.Size([3]))
    """
    # Names as in PyTorch's kernel, which has `eps1` and `eps2`.
    options: dict[str, Any] = {
        "beta2_decay": beta2_decay,
        "eps1": eps[0],
        "eps2": eps[1],
        "d": d,
        "weight_decay": weight_decay,
        "maximize": maximize,
    }

    def init_slots(param: torch.Tensor) -> Slots:
        if param.is_complex():
            raise OptimizerError(
                "Adafactor does not support complex parameters",
                got=f"a parameter of dtype {param.dtype}",
                fix="use `adamw`",
            )
        # A vector has no factors: its second moments are stored in full.
        if param.ndim < 2:
            return {"variance": torch.zeros_like(param)}
        *batch, num_rows, num_columns = param.shape
        return {
            "row_var": param.new_zeros(*batch, num_rows, 1),
            "col_var": param.new_zeros(*batch, 1, num_columns),
        }

    def kernel(args: KernelArguments) -> None:
        from torch.optim._adafactor import adafactor as torch_adafactor

        # PyTorch passes all three lists and skips the entries that are None.
        absent = [None] * len(args.params)  # of a slot that no parameter has
        torch_adafactor(
            args.params,
            args.grads,
            args.slots.get("row_var", absent),
            args.slots.get("col_var", absent),
            args.slots.get("variance", absent),
            args.steps,
            foreach=foreach,
            lr=args.lr,
            **options,
        )

    # The kernel computes step sizes as Python floats in double precision; the formula cannot.
    algorithm = Algorithm(init_slots, formulas.adafactor(**options), kernel, has_own_shapes=True)
    return make_optimizer("adafactor", lr, algorithm, options)


def muon(
    lr: float | Schedule = 1e-3,
    *,
    weight_decay: float = 0.1,
    momentum: float = 0.95,
    nesterov: bool = True,
    ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
    eps: float = 1e-7,
    ns_steps: int = 5,
    adjust_lr_fn: str | None = None,
) -> GradientTransformation:
    """Muon (Jordan et al., 2024) for matrices: `torch.optim.Muon`.

    Give the other parameters of a model another optimizer with `partition`.

    Effects: pure.

    Args:
        lr: Learning rate, or a schedule of it over the number of updates.
        weight_decay: Parameters are multiplied by `1 - lr * weight_decay` before each update.
        momentum: Momentum factor.
        nesterov: Whether to use Nesterov momentum.
        ns_coefficients: Coefficients of the Newton-Schulz polynomial.
        eps: Limit from below for the norm by which an update is divided.
        ns_steps: Newton-Schulz iterations, from 1 to 99.
        adjust_lr_fn: How the rate depends on the shape: "original" (the default for None), or
            "match_rms_adamw" (Liu et al., 2025, arXiv:2502.16982).

    Raises:
        ConfigError: An option is out of range, or `adjust_lr_fn` is unknown.
        OptimizerError: In `init`: a parameter is not a real matrix.

    Examples:
        >>> from tensordict import TensorDict
        >>> from faccel.func import adamw, muon, partition
        >>> groups = {"matrices": muon(2e-2), "other": adamw(1e-3)}
        >>> optimizer = partition(groups, lambda name, p: "matrices" if p.ndim == 2 else "other")
        >>> state = optimizer.init(TensorDict({"w": torch.ones(2, 2), "b": torch.ones(2)}))
        >>> sorted(state["matrices"].keys())
        ['count', 'momentum_buffer']
    """
    if adjust_lr_fn is not None:
        one_of("adjust_lr_fn", adjust_lr_fn, ("original", "match_rms_adamw"))
    options: dict[str, Any] = {
        "weight_decay": weight_decay,
        "momentum": momentum,
        "nesterov": nesterov,
        "ns_coefficients": ns_coefficients,
        "eps": eps,
        "ns_steps": ns_steps,
        "adjust_lr_fn": adjust_lr_fn,
    }

    def init_slots(param: torch.Tensor) -> Slots:
        if param.ndim != 2 or param.is_complex():
            raise OptimizerError(
                "Muon supports real matrices only",
                got=f"a parameter of shape {tuple(param.shape)}, {param.dtype}",
                fix='write `partition({"matrices": muon(2e-2), "other": adamw(1e-3)}, '
                "lambda name, param: ...)`",
            )
        return {"momentum_buffer": torch.zeros_like(param)}

    # No kernel: the formula makes the same calls as PyTorch's and is bit-equal.
    return make_optimizer("muon", lr, Algorithm(init_slots, formulas.muon(**options)), options)
