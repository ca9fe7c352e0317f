"""The algorithms of the optimizers as pure formulas, for where a transform of torch's looks on.

Each `name(**options)` returns `formula(param, grad, slots, count, lr) -> (param, slots)`: the step that torch's kernel
of that name makes, in operations that can be vmapped, differentiated and compiled; `count` is how many came before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Slots = dict[str, torch.Tensor]
Formula = Callable[
    [torch.Tensor, torch.Tensor, Slots, torch.Tensor, Any], tuple[torch.Tensor, Slots]
]


def sgd(
    *, momentum: float, dampening: float, weight_decay: float, nesterov: bool, maximize: bool
) -> Formula:
    """Stochastic gradient descent."""

    def formula(
        p: torch.Tensor, g: torch.Tensor, slots: Slots, count: torch.Tensor, lr: Any
    ) -> Any:
        g = (-g if maximize else g) + (weight_decay * p if weight_decay else 0.0)
        if not momentum:
            return p - lr * g, {}
        buffer = momentum * slots["momentum_buffer"] + (1 - dampening) * g
        if dampening:
            buffer = torch.where((count == 0).to(p.device), g, buffer)
        return p - lr * (g + momentum * buffer if nesterov else buffer), {"momentum_buffer": buffer}

    return formula


def adam(
    *,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    amsgrad: bool,
    maximize: bool,
    decoupled: bool,
) -> Formula:
    """Adam, with weight decay in the gradient or decoupled from it."""

    def formula(
        p: torch.Tensor, g: torch.Tensor, slots: Slots, count: torch.Tensor, lr: Any
    ) -> Any:
        g = -g if maximize else g
        if weight_decay:
            p, g = (p * (1 - lr * weight_decay), g) if decoupled else (p, g + weight_decay * p)
        t = (
            count.double() + 1
        )  # on the CPU, where double precision is everywhere: 1 - 0.999 is small
        first = beta1 * slots["exp_avg"] + (1 - beta1) * g
        second = beta2 * slots["exp_avg_sq"] + (1 - beta2) * g * g
        new = {"exp_avg": first, "exp_avg_sq": second}
        if amsgrad:
            new["max_exp_avg_sq"] = second = torch.maximum(slots["max_exp_avg_sq"], second)
        denominator = _root(second) / like((1 - beta2**t).sqrt(), p) + eps
        return p - like(lr / (1 - beta1**t), p) * first / denominator, new

    return formula


def like(number: torch.Tensor, param: torch.Tensor) -> torch.Tensor:
    """Return a number of the host where a parameter is, in its precision or in float32."""
    return number.to(param.device, torch.float64 if param.dtype == torch.float64 else torch.float32)


def _root(x: torch.Tensor) -> torch.Tensor:
    """The square root, with a gradient of 0 where it is 0: there its own is infinite, and would be multiplied by 0."""
    is_zero = x == 0
    return torch.where(is_zero, 0.0, torch.where(is_zero, 1.0, x).sqrt())


def adagrad(*, lr_decay: float, weight_decay: float, eps: float, maximize: bool) -> Formula:
    """Adagrad."""

    def formula(
        p: torch.Tensor, g: torch.Tensor, slots: Slots, count: torch.Tensor, lr: Any
    ) -> Any:
        g = (-g if maximize else g) + (weight_decay * p if weight_decay else 0.0)
        total = slots["sum"] + g * g
        rate = like(lr / (1 + count.double() * lr_decay), p)
        return p - rate * g / (_root(total) + eps), {"sum": total}

    return formula


def rmsprop(
    *,
    alpha: float,
    eps: float,
    weight_decay: float,
    momentum: float,
    centered: bool,
    maximize: bool,
) -> Formula:
    """RMSprop."""

    def formula(
        p: torch.Tensor, g: torch.Tensor, slots: Slots, count: torch.Tensor, lr: Any
    ) -> Any:
        g = (-g if maximize else g) + (weight_decay * p if weight_decay else 0.0)
        square = alpha * slots["square_avg"] + (1 - alpha) * g * g
        new, variance = {"square_avg": square}, square
        if centered:
            new["grad_avg"] = mean = alpha * slots["grad_avg"] + (1 - alpha) * g
            variance = square - mean * mean
        direction = g / (_root(variance) + eps)
        if momentum:
            new["momentum_buffer"] = direction = momentum * slots["momentum_buffer"] + direction
        return p - lr * direction, new

    return formula


def adafactor(
    *,
    beta2_decay: float,
    eps1: float | None,
    eps2: float,
    d: float,
    weight_decay: float,
    maximize: bool,
) -> Formula:
    """Adafactor, with factored second moments for what has more than one dim."""

    def formula(
        p: torch.Tensor, g: torch.Tensor, slots: Slots, count: torch.Tensor, lr: Any
    ) -> Any:
        g = -g if maximize else g
        t = like(count.double() + 1, p)
        floor = torch.finfo(p.dtype).eps if eps1 is None else eps1
        weight = t**beta2_decay
        rho = torch.minimum(torch.as_tensor(lr, dtype=t.dtype, device=t.device), t**-0.5)
        rate = p.norm(2).div(p.numel() ** 0.5).clamp(min=eps2) * rho
        if weight_decay:
            p = p * (1 - lr * weight_decay)
        squares, new = g * g, {}
        if g.ndim > 1:
            new["row_var"] = rows = slots["row_var"].lerp(squares.mean(-1, keepdim=True), weight)
            new["col_var"] = columns = slots["col_var"].lerp(squares.mean(-2, keepdim=True), weight)
            variance = rows @ columns / rows.mean(-2, keepdim=True).clamp(min=floor)
        else:
            new["variance"] = variance = slots["variance"].lerp(squares, weight)
        step = variance.clamp(min=floor * floor).rsqrt() * g
        return p - rate * step / (step.norm(2) / (step.numel() ** 0.5 * d)).clamp(min=1.0), new

    return formula


def muon(
    *,
    weight_decay: float,
    momentum: float,
    nesterov: bool,
    ns_coefficients: tuple[float, float, float],
    eps: float,
    ns_steps: int,
    adjust_lr_fn: str | None,
) -> Formula:
    """Muon: momentum, made orthogonal by Newton-Schulz iterations in bfloat16."""
    a, b, c = ns_coefficients

    def orthogonal(m: torch.Tensor) -> torch.Tensor:
        is_tall = m.shape[-2] > m.shape[-1]
        x = (m.mT if is_tall else m).to(torch.bfloat16)
        x = x / x.norm().clamp(min=eps)
        for _ in range(ns_steps):
            gram = x @ x.mT
            x = a * x + (b * gram + c * (gram @ gram)) @ x
        return x.mT if is_tall else x

    def formula(
        p: torch.Tensor, g: torch.Tensor, slots: Slots, count: torch.Tensor, lr: Any
    ) -> Any:
        rows, columns = p.shape[-2:]
        scales = {"match_rms_adamw": 0.2 * max(rows, columns) ** 0.5}
        scale = scales.get(adjust_lr_fn or "original", max(1.0, rows / columns) ** 0.5)
        buffer = slots["momentum_buffer"].lerp(g, 1 - momentum)
        step = orthogonal(g.lerp(buffer, momentum) if nesterov else buffer).to(p.dtype)
        return p * (1 - lr * weight_decay) - lr * scale * step, {"momentum_buffer": buffer}

    return formula
