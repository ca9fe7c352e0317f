"""Optimizers as gradient transformations, on the functional kernels that torch's own optimizers run.

Eagerly each of them is, bit for bit, the class of torch of that name. Where a transform looks on (`vmap`, `grad`,
`torch.compile`), kernels that read numbers from tensors cannot be used: there the same algorithm is a formula.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import faccel.func.formulas as formulas
from faccel.errors import ConfigError, OptimizerError, nearest
from faccel.func.gradient_transformation import GradientTransformation
from faccel.func.optimizer_factory import Rule, Slots, optimizer
from faccel.func.transforms import Schedule


def _zeros(*names: str) -> Callable[[torch.Tensor], Slots]:
    return lambda param: {name: torch.zeros_like(param) for name in names}


def sgd(
    lr: float | Schedule = 1e-3,
    *,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    foreach: bool | None = None,
    fused: bool | None = None,
) -> GradientTransformation:
    """Stochastic gradient descent with momentum: `torch.optim.SGD`.

    Effects: pure.

    Args:
        lr: Learning rate, or a schedule of it over the number of updates.
        momentum: As in torch, likewise the others.

    Examples:
        >>> from tensordict import TensorDict
        >>> from faccel.func import apply_updates, sgd
        >>> optimizer, params = sgd(0.1, momentum=0.9), TensorDict({"w": torch.ones(())})
        >>> updates, state = optimizer.update(params, optimizer.init(params), params)
        >>> apply_updates(params, updates)["w"], state["momentum_buffer"]["w"]
        (tensor(0.9000), tensor(1.))
    """
    if nesterov and (momentum <= 0 or dampening != 0):
        raise ConfigError(
            "Nesterov momentum needs a momentum and no dampening",
            got=f"momentum={momentum}, dampening={dampening}",
            fix="write `sgd(lr, momentum=0.9, nesterov=True)`",
        )
    options: dict[str, Any] = {
        "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay, "nesterov": nesterov,
        "maximize": maximize,
    }  # fmt: skip

    def kernel(ps: Any, gs: Any, slots: Any, steps: Any, rate: float, *, is_first: bool) -> None:
        from torch.optim.sgd import sgd as run

        buffers: list[Any] = slots.get("momentum_buffer") or [None] * len(ps)
        if (
            is_first and dampening
        ):  # the first gradient is not dampened; torch says so by having no buffer yet
            made: list[Any] = [None] * len(ps)
            run(ps, gs, made, foreach=foreach, fused=fused, lr=rate, **options)
            for buffer, first in zip(buffers, made, strict=True):
                buffer.copy_(first)
            return
        run(ps, gs, buffers, foreach=foreach, fused=fused, lr=rate, **options)

    slots = _zeros("momentum_buffer") if momentum else _zeros()
    rule = Rule(slots, kernel, formulas.sgd(**options), writes_grads=nesterov)
    return optimizer("sgd", lr, rule, **options)


def _adam(
    name: str, lr: float | Schedule, *, decoupled: bool, **options: Any
) -> GradientTransformation:
    fused = options.pop("fused")
    foreach = options.pop("foreach")
    beta1, beta2 = options.pop("betas")
    options |= {"beta1": beta1, "beta2": beta2}

    def kernel(ps: Any, gs: Any, slots: Any, steps: Any, rate: float, *, is_first: bool) -> None:
        from torch.optim.adam import adam as run

        run(
            ps, gs, slots["exp_avg"], slots["exp_avg_sq"], slots.get("max_exp_avg_sq") or [], steps, foreach=foreach,
            fused=fused, has_complex=any(p.is_complex() for p in ps), decoupled_weight_decay=decoupled, lr=rate,
            **options,
        )  # fmt: skip

    names = ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if options["amsgrad"] else ()))
    rule = Rule(
        _zeros(*names), kernel, formulas.adam(decoupled=decoupled, **options), on_device=bool(fused)
    )
    return optimizer(name, lr, rule, **options)


def adam(
    lr: float | Schedule = 1e-3,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    amsgrad: bool = False,
    maximize: bool = False,
    foreach: bool | None = None,
    fused: bool | None = None,
) -> GradientTransformation:
    """Adam (Kingma and Ba, 2015): `torch.optim.Adam`.

    Effects: pure.

    Args:
        lr: Learning rate, or a schedule of it over the number of updates.
        betas: As in torch, likewise the others.

    Examples:
        >>> from tensordict import TensorDict
        >>> from faccel.func import adam
        >>> sorted(adam(1e-3).init(TensorDict({"w": torch.ones(2)})).keys())
        ['count', 'exp_avg', 'exp_avg_sq']
    """
    return _adam(
        "adam", lr, decoupled=False, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad,
        maximize=maximize, foreach=foreach, fused=fused,
    )  # fmt: skip


def adamw(
    lr: float | Schedule = 1e-3,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    amsgrad: bool = False,
    maximize: bool = False,
    foreach: bool | None = None,
    fused: bool | None = None,
) -> GradientTransformation:
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019): `torch.optim.AdamW`.

    Effects: pure.

    Args:
        lr: Learning rate, or a schedule of it over the number of updates.
        betas: As in torch, likewise the others.

    Examples:
        >>> from faccel.func import adamw, chain, clip_by_global_norm
        >>> optimizer = chain(clip_by_global_norm(1.0), adamw(1e-3, weight_decay=0.1))
    """
    return _adam(
        "adamw", lr, decoupled=True, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad,
        maximize=maximize, foreach=foreach, fused=fused,
    )  # fmt: skip


def adagrad(
    lr: float | Schedule = 1e-2,
    *,
    lr_decay: float = 0.0,
    weight_decay: float = 0.0,
    initial_accumulator_value: float = 0.0,
    eps: float = 1e-10,
    maximize: bool = False,
    foreach: bool | None = None,
    fused: bool | None = None,
) -> GradientTransformation:
    """Adagrad (Duchi, Hazan and Singer, 2011): `torch.optim.Adagrad`.

    Effects: pure.

    Args:
        lr: Learning rate, or a schedule of it over the number of updates.
        lr_decay: As in torch, likewise the others.

    Examples:
        >>> from tensordict import TensorDict
        >>> from faccel.func import adagrad
        >>> adagrad(initial_accumulator_value=0.1).init(TensorDict({"w": torch.ones(1)}))["sum"]["w"]
        tensor([0.1000])
    """
    options: dict[str, Any] = {
        "lr_decay": lr_decay,
        "weight_decay": weight_decay,
        "eps": eps,
        "maximize": maximize,
    }

    def slots(param: torch.Tensor) -> Slots:
        start = initial_accumulator_value
        return {
            "sum": torch.full_like(param, complex(start, start) if param.is_complex() else start)
        }

    def kernel(ps: Any, gs: Any, slots: Any, steps: Any, rate: float, *, is_first: bool) -> None:
        from torch.optim.adagrad import adagrad as run

        has_complex = any(p.is_complex() for p in ps)
        run(
            ps,
            gs,
            slots["sum"],
            steps,
            foreach=foreach,
            fused=fused,
            has_complex=has_complex,
            lr=rate,
            **options,
        )

    rule = Rule(slots, kernel, formulas.adagrad(**options), on_device=bool(fused))
    return optimizer(
        "adagrad", lr, rule, initial_accumulator_value=initial_accumulator_value, **options
    )


def rmsprop(
    lr: float | Schedule = 1e-2,
    *,
    alpha: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    centered: bool = False,
    maximize: bool = False,
    foreach: bool | None = None,
) -> GradientTransformation:
    """RMSprop (Hinton, 2012): `torch.optim.RMSprop`.

    Effects: pure.

    Args:
        lr: Learning rate, or a schedule of it over the number of updates.
        alpha: As in torch, likewise the others.

    Examples:
        >>> from tensordict import TensorDict
        >>> from faccel.func import rmsprop
        >>> sorted(rmsprop(momentum=0.9).init(TensorDict({"w": torch.ones(2)})).keys())
        ['count', 'momentum_buffer', 'square_avg']
    """
    options: dict[str, Any] = {
        "alpha": alpha, "eps": eps, "weight_decay": weight_decay, "momentum": momentum, "centered": centered,
        "maximize": maximize,
    }  # fmt: skip

    def kernel(ps: Any, gs: Any, slots: Any, steps: Any, rate: float, *, is_first: bool) -> None:
        from torch.optim.rmsprop import rmsprop as run

        averages, buffers = slots.get("grad_avg") or [], slots.get("momentum_buffer") or []
        has_complex = any(p.is_complex() for p in ps)
        run(ps, gs, slots["square_avg"], averages, buffers, steps, foreach=foreach, has_complex=has_complex, lr=rate,
            **options)  # fmt: skip

    names = (
        "square_avg",
        *(("momentum_buffer",) if momentum else ()),
        *(("grad_avg",) if centered else ()),
    )
    return optimizer(
        "rmsprop", lr, Rule(_zeros(*names), kernel, formulas.rmsprop(**options)), **options
    )


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
    """Adafactor (Shazeer and Stern, 2018): `torch.optim.Adafactor`; second moments of matrices as rows and columns.

    Effects: pure.

    Args:
        lr: Learning rate, or a schedule of it over the number of updates.
        beta2_decay: As in torch, likewise the others.

    Examples:
        >>> from tensordict import TensorDict
        >>> from faccel.func import adafactor
        >>> state = adafactor().init(TensorDict({"w": torch.ones(2, 3), "b": torch.ones(3)}))
        >>> state["row_var"]["w"].shape, state["col_var"]["w"].shape, state["variance"]["b"].shape
        (torch.Size([2, 1]), torch.Size([1, 3]), torch.Size([3]))
    """
    options: dict[str, Any] = {
        "beta2_decay": beta2_decay, "eps1": eps[0], "eps2": eps[1], "d": d, "weight_decay": weight_decay,
        "maximize": maximize,
    }  # fmt: skip

    def slots(param: torch.Tensor) -> Slots:
        if param.is_complex():
            raise OptimizerError(
                "Adafactor is for real parameters", got="a complex one", fix="use `adamw`"
            )
        if param.ndim < 2:
            return {"variance": torch.zeros_like(param)}
        *rest, rows, columns = param.shape
        return {
            "row_var": param.new_zeros(*rest, rows, 1),
            "col_var": param.new_zeros(*rest, 1, columns),
        }

    def kernel(ps: Any, gs: Any, slots: Any, steps: Any, rate: float, *, is_first: bool) -> None:
        from torch.optim._adafactor import adafactor as run

        rows, columns, variances = (
            slots.get(slot, [None] * len(ps)) for slot in ("row_var", "col_var", "variance")
        )
        run(ps, gs, rows, columns, variances, steps, foreach=foreach, lr=rate, **options)

    rule = Rule(slots, kernel, formulas.adafactor(**options), has_own_shapes=True)
    return optimizer("adafactor", lr, rule, **options)


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
    """Muon (Jordan et al., 2024): `torch.optim.Muon`, for matrices; give the rest of a model another by `partition`.

    Effects: pure.

    Args:
        lr: Learning rate, or a schedule of it over the number of updates.
        weight_decay: As in torch, likewise the others.

    Raises:
        OptimizerError: Later, in `init`: a parameter is no matrix.

    Examples:
        >>> from faccel.func import adamw, muon, partition
        >>> parts = {"matrices": muon(2e-2), "rest": adamw(1e-3)}
        >>> optimizer = partition(parts, lambda name, param: "matrices" if param.ndim == 2 else "rest")
    """
    if adjust_lr_fn not in (None, "original", "match_rms_adamw"):
        fix = nearest(str(adjust_lr_fn), ("original", "match_rms_adamw"))
        raise ConfigError("`adjust_lr_fn` names no adjustment", got=repr(adjust_lr_fn), fix=fix)
    options: dict[str, Any] = {
        "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov, "ns_coefficients": ns_coefficients,
        "eps": eps, "ns_steps": ns_steps, "adjust_lr_fn": adjust_lr_fn,
    }  # fmt: skip

    def slots(param: torch.Tensor) -> Slots:
        if param.ndim != 2 or param.is_complex():
            raise OptimizerError(
                "Muon is for real matrices",
                got=f"a parameter of shape {tuple(param.shape)}, {param.dtype}",
                fix='write `partition({"matrices": muon(2e-2), "rest": adamw(1e-3)}, lambda name, param: ...)`',
            )
        return {"momentum_buffer": torch.zeros_like(param)}

    def kernel(ps: Any, gs: Any, slots: Any, steps: Any, rate: float, *, is_first: bool) -> None:
        from torch.optim._muon import muon as run

        run(ps, gs, slots["momentum_buffer"], lr=rate, has_complex=False, **options)

    return optimizer("muon", lr, Rule(slots, kernel, formulas.muon(**options)), **options)
