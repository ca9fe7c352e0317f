"""The algorithms of the optimizers as pure formulas, for PyTorch's transforms.

Each `name(**options)` returns `formula(param, grad, slots, count, lr) -> (param, slots)`: the step
of PyTorch's kernel of that name, in operations that can be vmapped, differentiated and compiled.
`slots` are the tensors that an optimizer stores for one parameter, `count` int64[] is the number
of completed updates. In the comments p is the parameter, g its gradient, t = count + 1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.optim._muon as torch_muon

from faccel.tree import Tree

Slots = dict[str, torch.Tensor]
Rate = float | torch.Tensor
Formula = Callable[
    [torch.Tensor, torch.Tensor, Slots, torch.Tensor, Rate], tuple[torch.Tensor, Slots]
]


def scalar_like(value: torch.Tensor, param: torch.Tensor) -> torch.Tensor:
    """Return a 0-d tensor on the device of a parameter, in float64 for float64, else in float32."""
    dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
    return value.to(param.device, dtype)


def _sqrt(x: torch.Tensor) -> torch.Tensor:
    """Return the square root, with derivative 0 at 0.

    The true derivative is infinite there, and infinity times a zero gradient is NaN. Second
    moments are exactly 0 wherever a gradient was 0, as after a dead ReLU.
    """
    # `where` twice: the branch that is not selected must have a finite derivative, too
    is_zero = x == 0
    return torch.where(is_zero, 0.0, torch.where(is_zero, 1.0, x).sqrt())


def _ascent(grad: torch.Tensor, *, maximize: bool) -> torch.Tensor:
    """Return the gradient of the loss to minimize."""
    return -grad if maximize else grad


def _with_decay(
    param: torch.Tensor, grad: torch.Tensor, *, maximize: bool, weight_decay: float
) -> torch.Tensor:
    """Return the gradient with L2 weight decay: g + weight_decay * p."""
    grad = _ascent(grad, maximize=maximize)
    if not weight_decay:
        return grad
    return grad + weight_decay * param


def sgd(
    *, momentum: float, dampening: float, weight_decay: float, nesterov: bool, maximize: bool
) -> Formula:
    """Stochastic gradient descent with momentum, in the form of Sutskever et al., 2013."""

    def formula(
        param: torch.Tensor, grad: torch.Tensor, slots: Slots, count: torch.Tensor, lr: Rate
    ) -> tuple[torch.Tensor, Slots]:
        grad = _with_decay(param, grad, maximize=maximize, weight_decay=weight_decay)
        if not momentum:
            return param - lr * grad, {}
        # b = momentum * b + (1 - dampening) * g
        buffer = momentum * slots["momentum_buffer"] + (1 - dampening) * grad
        if dampening:
            # as in PyTorch, the first gradient is not dampened
            is_first = (count == 0).to(param.device)
            buffer = torch.where(is_first, grad, buffer)
        direction = grad + momentum * buffer if nesterov else buffer
        return param - lr * direction, {"momentum_buffer": buffer}

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
    """Adam (Kingma and Ba, 2015), with weight decay in the gradient, or decoupled (AdamW)."""

    def formula(
        param: torch.Tensor, grad: torch.Tensor, slots: Slots, count: torch.Tensor, lr: Rate
    ) -> tuple[torch.Tensor, Slots]:
        grad = _ascent(grad, maximize=maximize)
        if weight_decay and decoupled:
            param = param * (1 - lr * weight_decay)
        if weight_decay and not decoupled:
            grad = grad + weight_decay * param
        # m = beta1 * m + (1 - beta1) * g;  v = beta2 * v + (1 - beta2) * g^2
        first = beta1 * slots["exp_avg"] + (1 - beta1) * grad
        second = beta2 * slots["exp_avg_sq"] + (1 - beta2) * grad * grad
        new_slots = {"exp_avg": first, "exp_avg_sq": second}
        if amsgrad:  # Reddi et al., 2018: the largest second moment so far
            second = torch.maximum(slots["max_exp_avg_sq"], second)
            new_slots["max_exp_avg_sq"] = second
        # Bias corrections in float64, on the CPU, where every build has it: 1 - 0.999 is small.
        t = count.double() + 1
        correction1 = 1 - beta1**t
        correction2 = (1 - beta2**t).sqrt()
        # p = p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
        denominator = _sqrt(second) / scalar_like(correction2, param) + eps
        step_size = scalar_like(lr / correction1, param)
        return param - step_size * first / denominator, new_slots

    return formula


def adagrad(*, lr_decay: float, weight_decay: float, eps: float, maximize: bool) -> Formula:
    """Adagrad (Duchi, Hazan and Singer, 2011)."""

    def formula(
        param: torch.Tensor, grad: torch.Tensor, slots: Slots, count: torch.Tensor, lr: Rate
    ) -> tuple[torch.Tensor, Slots]:
        grad = _with_decay(param, grad, maximize=maximize, weight_decay=weight_decay)
        # s = s + g^2;  p = p - lr / (1 + (t - 1) * lr_decay) * g / (sqrt(s) + eps)
        total = slots["sum"] + grad * grad
        step_size = scalar_like(lr / (1 + count.double() * lr_decay), param)
        return param - step_size * grad / (_sqrt(total) + eps), {"sum": total}

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
    """RMSprop (Hinton, 2012), centered as in Graves, 2013 (arXiv:1308.0850)."""

    def formula(
        param: torch.Tensor, grad: torch.Tensor, slots: Slots, count: torch.Tensor, lr: Rate
    ) -> tuple[torch.Tensor, Slots]:
        grad = _with_decay(param, grad, maximize=maximize, weight_decay=weight_decay)
        # v = alpha * v + (1 - alpha) * g^2
        variance = alpha * slots["square_avg"] + (1 - alpha) * grad * grad
        new_slots = {"square_avg": variance}
        if centered:
            # the variance instead of the second moment: v - mean(g)^2
            mean = alpha * slots["grad_avg"] + (1 - alpha) * grad
            new_slots["grad_avg"] = mean
            variance = variance - mean * mean
        direction = grad / (_sqrt(variance) + eps)
        if momentum:
            direction = momentum * slots["momentum_buffer"] + direction
            new_slots["momentum_buffer"] = direction
        return param - lr * direction, new_slots

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
    """Adafactor (Shazeer and Stern, 2018), with factored second moments of matrices."""

    def second_moment(
        grad: torch.Tensor, slots: Slots, weight: torch.Tensor, floor: float
    ) -> tuple[torch.Tensor, Slots]:
        squares = grad * grad
        if grad.ndim < 2:
            variance = slots["variance"].lerp(squares, weight)
            return variance, {"variance": variance}
        # v[i, j] = rows[i] * columns[j] / mean(rows): n + m numbers instead of n * m
        rows = slots["row_var"].lerp(squares.mean(-1, keepdim=True), weight)
        columns = slots["col_var"].lerp(squares.mean(-2, keepdim=True), weight)
        variance = rows @ columns / rows.mean(-2, keepdim=True).clamp(min=floor)
        return variance, {"row_var": rows, "col_var": columns}

    def formula(
        param: torch.Tensor, grad: torch.Tensor, slots: Slots, count: torch.Tensor, lr: Rate
    ) -> tuple[torch.Tensor, Slots]:
        grad = _ascent(grad, maximize=maximize)
        t = scalar_like(count.double() + 1, param)
        floor = torch.finfo(param.dtype).eps if eps1 is None else eps1
        # step size relative to the scale of the parameter: max(eps2, RMS(p)) * min(lr, 1/sqrt(t))
        rho = torch.minimum(torch.as_tensor(lr, dtype=t.dtype, device=t.device), t**-0.5)
        rms = param.norm(2).div(param.numel() ** 0.5)
        step_size = rms.clamp(min=eps2) * rho
        if weight_decay:
            param = param * (1 - lr * weight_decay)
        # 1 - beta2(t) = t^beta2_decay: the first update stores its squares undampened
        variance, new_slots = second_moment(grad, slots, t**beta2_decay, floor)
        update = variance.clamp(min=floor * floor).rsqrt() * grad
        # update clipping: its RMS is at most d
        excess = update.norm(2) / (update.numel() ** 0.5 * d)
        return param - step_size * update / excess.clamp(min=1.0), new_slots

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
    """Muon (Jordan et al., 2024): momentum, made orthogonal by Newton-Schulz iterations.

    Bit-equal to PyTorch's kernel where `lr` is a float: it is the only implementation.
    """
    functions: Tree = torch_muon  # its building blocks have no public names

    def formula(
        param: torch.Tensor, grad: torch.Tensor, slots: Slots, count: torch.Tensor, lr: Rate
    ) -> tuple[torch.Tensor, Slots]:
        buffer = slots["momentum_buffer"].lerp(grad, 1 - momentum)
        update = grad.lerp(buffer, momentum) if nesterov else buffer
        update = functions._zeropower_via_newtonschulz(update, ns_coefficients, ns_steps, eps)
        step_size = functions._adjust_lr(lr, adjust_lr_fn, param.shape)
        decayed = param * (1 - lr * weight_decay)
        if isinstance(step_size, torch.Tensor):  # `alpha` must be a number
            return decayed - step_size * update.to(param.dtype), {"momentum_buffer": buffer}
        return decayed.add(update, alpha=-step_size), {"momentum_buffer": buffer}

    return formula
