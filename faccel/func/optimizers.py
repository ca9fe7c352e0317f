"""Optimizers as gradient transformations: `torch.optim` classes as pure functions.

Eagerly each of them equals the class of that name bit for bit. Under `vmap`, `grad` and
`torch.compile` the same algorithm is a formula; see `optimizer_factory`. Options that are not
described have the meaning and default that they have in `torch.optim`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import faccel.func.formulas as formulas
from faccel.errors import ConfigError
from faccel.func.formulas import Slots
from faccel.func.gradient_transformation import GradientTransformation
from faccel.func.optimizer_factory import Algorithm, KernelArguments, make_optimizer
from faccel.func.schedules import Schedule


def _zeros(*names: str) -> Callable[[torch.Tensor], Slots]:
    """Return the function that makes zeros of the shape of a parameter under each name."""
    return lambda param: {name: torch.zeros_like(param) for name in names}


def _has_complex(params: list[torch.Tensor]) -> bool:
    # Kernels view complex tensors as real ones, which costs time for real models.
    return any(param.is_complex() for param in params)


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
        momentum: Momentum factor; with 0 the state has no momentum buffers.
        dampening: Fraction of a gradient that is not added to the momentum buffer.
        weight_decay: L2 penalty, added to the gradient.
        nesterov: Whether to use Nesterov momentum.
        maximize: Whether to maximize the loss.
        foreach: Whether to use the kernel over lists of tensors; None lets PyTorch choose.
        fused: Whether to use the fused kernel.

    Raises:
        ConfigError: An option is out of range, or `nesterov` without momentum.

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
            "`nesterov=True` needs a positive `momentum` and no `dampening`",
            got=f"momentum={momentum}, dampening={dampening}",
            fix="write `sgd(lr, momentum=0.9, nesterov=True)`",
        )
    options: dict[str, Any] = {
        "momentum": momentum,
        "dampening": dampening,
        "weight_decay": weight_decay,
        "nesterov": nesterov,
        "maximize": maximize,
    }

    def kernel(args: KernelArguments) -> None:
        # Functions of `torch.optim` are imported where they are used: only this optimizer needs it.
        from torch.optim.sgd import sgd as torch_sgd

        no_buffers: list[torch.Tensor | None] = [None] * len(args.params)
        buffers = args.slots.get("momentum_buffer", no_buffers)
        # PyTorch does not dampen the first gradient: it creates the buffer from it, where it
        # finds None. The state here has buffers from the start, so copy the new ones into them.
        # Without dampening a buffer of zeros leads to the same first step.
        creates_buffers = args.is_first and dampening != 0
        kernel_buffers = no_buffers if creates_buffers else buffers
        torch_sgd(
            args.params,
            args.grads,
            kernel_buffers,
            foreach=foreach,
            fused=fused,
            lr=args.lr,
            **options,
        )
        if creates_buffers and momentum:
            for buffer, created in zip(buffers, kernel_buffers, strict=True):
                buffer.copy_(created)

    algorithm = Algorithm(
        init_slots=_zeros("momentum_buffer") if momentum else _zeros(),
        formula=formulas.sgd(**options),
        kernel=kernel,
        writes_grads=nesterov,  # the foreach kernel adds the momentum to the gradient in place
    )
    return make_optimizer("sgd", lr, algorithm, options)


def _adam(
    name: str,
    lr: float | Schedule,
    options: dict[str, Any],
    *,
    betas: tuple[float, float],
    decoupled: bool,
    foreach: bool | None,
    fused: bool | None,
) -> GradientTransformation:
    # The kernel and the formula take the two rates separately.
    options = {**options, "beta1": betas[0], "beta2": betas[1]}

    def kernel(args: KernelArguments) -> None:
        from torch.optim.adam import adam as torch_adam

        # One function for Adam and AdamW, as in PyTorch.
        torch_adam(
            args.params,
            args.grads,
            args.slots["exp_avg"],
            args.slots["exp_avg_sq"],
            args.slots.get("max_exp_avg_sq", []),
            args.steps,
            foreach=foreach,
            fused=fused,
            has_complex=_has_complex(args.params),
            decoupled_weight_decay=decoupled,
            lr=args.lr,
            **options,
        )

    # The names of the entries of `torch.optim.Adam.state`.
    names = ["exp_avg", "exp_avg_sq"]
    if options["amsgrad"]:
        names.append("max_exp_avg_sq")
    algorithm = Algorithm(
        init_slots=_zeros(*names),
        formula=formulas.adam(decoupled=decoupled, **options),
        kernel=kernel,
        steps_on_device=bool(fused),
    )
    return make_optimizer(name, lr, algorithm, options)


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
        betas: Decay rates of the first and second moments, each at least 0 and below 1.
        eps: Added to the denominator.
        weight_decay: L2 penalty, added to the gradient.
        amsgrad: Whether to divide by the largest second moment so far (Reddi et al., 2018).
        maximize: Whether to maximize the loss.
        foreach: Whether to use the kernel over lists of tensors; None lets PyTorch choose.
        fused: Whether to use the fused kernel.

    Raises:
        ConfigError: An option is out of range.

    Examples:
        >>> from tensordict import TensorDict
        >>> from faccel.func import adam
        >>> sorted(adam(1e-3).init(TensorDict({"w": torch.ones(2)})).keys())
        ['count', 'exp_avg', 'exp_avg_sq']
    """
    options = {"eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad, "maximize": maximize}
    return _adam("adam", lr, options, betas=betas, decoupled=False, foreach=foreach, fused=fused)


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
        betas: As in `adam`.
        eps: As in `adam`.
        weight_decay: Parameters are multiplied by `1 - lr * weight_decay` before each update.
        amsgrad: As in `adam`.
        maximize: As in `adam`.
        foreach: As in `adam`.
        fused: As in `adam`.

    Raises:
        ConfigError: An option is out of range.

    Examples:
        >>> from tensordict import TensorDict
        >>> from faccel.func import adamw, apply_updates
        >>> optimizer, params = adamw(0.1), TensorDict({"w": torch.ones(())})
        >>> updates, state = optimizer.update(params, optimizer.init(params), params)
        >>> apply_updates(params, updates)["w"]
        tensor(0.8990)
    """
    options = {"eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad, "maximize": maximize}
    return _adam("adamw", lr, options, betas=betas, decoupled=True, foreach=foreach, fused=fused)


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
        lr_decay: The rate of update `t`, from 0, is `lr / (1 + t * lr_decay)`.
        weight_decay: L2 penalty, added to the gradient.
        initial_accumulator_value: Where the sums of squared gradients start.
        eps: Added to the denominator.
        maximize: Whether to maximize the loss.
        foreach: Whether to use the kernel over lists of tensors; None lets PyTorch choose.
        fused: Whether to use the fused kernel.

    Raises:
        ConfigError: An option is out of range.

    Examples:
        >>> from tensordict import TensorDict
        >>> from faccel.func import adagrad
        >>> state = adagrad(initial_accumulator_value=0.1).init(TensorDict({"w": torch.ones(1)}))
        >>> state["sum"]["w"]
        tensor([0.1000])
    """
    options: dict[str, Any] = {
        "lr_decay": lr_decay,
        "weight_decay": weight_decay,
        "eps": eps,
        "maximize": maximize,
    }

    def init_slots(param: torch.Tensor) -> Slots:
        start: complex = initial_accumulator_value
        if param.is_complex():
            start = complex(start, start)  # real and imaginary parts are updated separately
        return {"sum": torch.full_like(param, start)}

    def kernel(args: KernelArguments) -> None:
        from torch.optim.adagrad import adagrad as torch_adagrad

        torch_adagrad(
            args.params,
            args.grads,
            args.slots["sum"],
            args.steps,
            foreach=foreach,
            fused=fused,
            has_complex=_has_complex(args.params),
            lr=args.lr,
            **options,
        )

    algorithm = Algorithm(
        init_slots, formulas.adagrad(**options), kernel, steps_on_device=bool(fused)
    )
    # Not an argument of the kernel, but checked like one.
    checked = {**options, "initial_accumulator_value": initial_accumulator_value}
    return make_optimizer("adagrad", lr, algorithm, checked)


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
        alpha: Decay rate of the second moments.
        eps: Added to the denominator.
        weight_decay: L2 penalty, added to the gradient.
        momentum: Momentum factor; with 0 the state has no momentum buffers.
        centered: Whether to divide by the estimated standard deviation (Graves, 2013).
        maximize: Whether to maximize the loss.
        foreach: Whether to use the kernel over lists of tensors; None lets PyTorch choose.

    Raises:
        ConfigError: An option is out of range.

    Examples:
        >>> from tensordict import TensorDict
        >>> from faccel.func import rmsprop
        >>> sorted(rmsprop(momentum=0.9).init(TensorDict({"w": torch.ones(2)})).keys())
        ['count', 'momentum_buffer', 'square_avg']
    """
    options: dict[str, Any] = {
        "alpha": alpha,
        "eps": eps,
        "weight_decay": weight_decay,
        "momentum": momentum,
        "centered": centered,
        "maximize": maximize,
    }

    def kernel(args: KernelArguments) -> None:
        from torch.optim.rmsprop import rmsprop as torch_rmsprop

        torch_rmsprop(
            args.params,
            args.grads,
            args.slots["square_avg"],
            args.slots.get("grad_avg", []),
            args.slots.get("momentum_buffer", []),
            args.steps,
            foreach=foreach,
            has_complex=_has_complex(args.params),
            lr=args.lr,
            **options,
        )

    # Buffers only where an option needs them: states are as large as PyTorch's.
    names = ["square_avg"]
    if momentum:
        names.append("momentum_buffer")
    if centered:
        names.append("grad_avg")
    algorithm = Algorithm(_zeros(*names), formulas.rmsprop(**options), kernel)
    return make_optimizer("rmsprop", lr, algorithm, options)
