"""Floating point operations: those of a function, and how many a device can do per second."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch

from faccel import device_table
from faccel.context import DistContext
from faccel.errors import ConfigError
from faccel.tree import Tree

# Dense peaks in 10^12 operations per second, a multiplication and an addition being two. Vendors
# often print twice as much, for matrices of which half the elements are zero: those are not used.
# NVIDIA: the data sheets of V100, T4, A100, A10, L4, L40S, H100 and H200; the Blackwell
# architecture technical brief; for GeForce the whitepapers of GA102, AD102 and GB202, with sums in
# fp32 as in PyTorch. AMD: the data sheets of the Instinct series (of MI250X one of its two dies,
# which is one device of PyTorch). Google: the pages of Cloud TPU about each version.
Shape = Sequence[int]
_TERA = 10**12
_PEAKS: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {
        r"V100S": {"fp16": 130, "fp32": 16.4},
        r"V100.*PCIE": {"fp16": 112, "fp32": 14},
        r"V100": {"fp16": 125, "fp32": 15.7},
        r"T4": {"fp16": 65, "fp32": 8.1},
        r"A100": {"bf16": 312, "fp16": 312, "tf32": 156, "fp32": 19.5},
        r"A10": {"bf16": 125, "fp16": 125, "tf32": 62.5, "fp32": 31.2},
        r"L4": {"bf16": 121, "fp16": 121, "tf32": 60, "fp32": 30.3},
        r"L40S": {"bf16": 362, "fp16": 362, "tf32": 183, "fp32": 91.6},
        r"H100.*PCIe": {"bf16": 756, "fp16": 756, "tf32": 378, "fp32": 51},
        r"H[12]00.*NVL": {"bf16": 835, "fp16": 835, "tf32": 417, "fp32": 60},
        r"G?H[12]00": {"bf16": 989, "fp16": 989, "tf32": 494, "fp32": 67},
        r"GB200": {"bf16": 2500, "fp16": 2500, "tf32": 1250, "fp32": 80},
        r"B200": {"bf16": 2250, "fp16": 2250, "tf32": 1100, "fp32": 80},
        r"RTX 3090": {"bf16": 71, "fp16": 71, "tf32": 35.6, "fp32": 35.6},
        r"RTX 4090": {"bf16": 165.2, "fp16": 165.2, "tf32": 82.6, "fp32": 82.6},
        r"RTX 5090": {"bf16": 209.5, "fp16": 209.5, "tf32": 104.8, "fp32": 104.8},
        r"MI250X": {"bf16": 191.5, "fp16": 191.5, "fp32": 47.9},
        r"MI3(00|25)X": {"bf16": 1307.4, "fp16": 1307.4, "tf32": 653.7, "fp32": 163.4},
        r"MI355X": {"bf16": 2516.6, "fp16": 2516.6, "fp32": 157.3},
        r"(TPU )?v4": {"bf16": 275},
        r"(TPU )?v5( ?lite|e|litepod)": {"bf16": 197},
        r"(TPU )?v5p?": {"bf16": 459},
        r"(TPU )?v6( ?lite|e)": {"bf16": 918},
    }
)
# A part of a device, and slower variants with the name of a faster one.
_OTHER_MODELS = re.compile(r" MIG |\bLaptop\b|\bMax-Q\b|\b[45]090 D", re.IGNORECASE)
_PRECISIONS = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def peak_of_model(name: str, precision: str) -> float | None:
    """Return the published dense peak of a device in FLOP/s, or None if it is unknown.

    Effects: pure.

    Args:
        name: The name that PyTorch reports, as in "NVIDIA H100 PCIe".
        precision: `"bf16"`, `"fp16"`, `"tf32"` or `"fp32"`.

    Examples:
        >>> peak_of_model("NVIDIA A100-SXM4-40GB", "bf16"), peak_of_model("NVIDIA A40", "bf16")
        (312000000000000.0, None)
    """
    if _OTHER_MODELS.search(name):
        return None
    for pattern, peaks in _PEAKS.items():
        # Whole words: an A10G and an L40 are other devices.
        if re.search(rf"\b{pattern}\b", name, re.IGNORECASE):
            peak = peaks.get(precision)
            if peak is not None:
                return float(peak * _TERA)
            break  # a more general pattern below is another model
    return None


def peak_of_context(ctx: DistContext) -> float | None:
    """Return the peak of the device of a context, in the precision in which it multiplies.

    Effects: ambient. Asks PyTorch for the name of the device.
    """
    dtype = ctx.compute_dtype or ctx.param_dtype
    precision = "tf32"
    if torch.get_float32_matmul_precision() == "highest":
        precision = "fp32"
    if dtype is not None:
        precision = _PRECISIONS[dtype]
    return peak_of_model(device_table.model_name(ctx.device), precision)


def flops_of(fn: Callable[..., object], *args: Tree, **kwargs: Tree) -> int:
    """Return the floating point operations of `fn(*args, **kwargs)`, which runs once.

    Effects: pure, as far as `fn` is. The operators run; on tensors of the device `meta` nothing is
    computed.

    PyTorch's counter adds up matrix products, convolutions and attention. A multiplication and an
    addition are two operations. Element-wise operators count nothing. Causal attention counts as
    full attention, and its backward as twice its forward, for every kernel. What activation
    checkpointing repeats is counted again: for the `mfu` of a meter, count a model without it. A
    rank counts the operators that it runs itself.

    Args:
        fn: Usually forward and backward of one sample, for `init_meter(flops_per_sample=...)`.
        *args: Its arguments.
        **kwargs: Its keyword arguments.

    Raises:
        ConfigError: `fn` is not callable.

    Examples:
        >>> layer = torch.nn.Linear(8, 4, bias=False, device="meta")
        >>> flops_of(layer, torch.empty(1, 8, device="meta"))
        64
        >>> flops_of(lambda x: layer(x).sum().backward(), torch.empty(1, 8, device="meta"))
        128
    """
    # Imported here: it takes 0.1 s, and most programs count nothing.
    from torch.utils.flop_counter import FlopCounterMode

    if not callable(fn):
        raise ConfigError(
            "`fn` must be a function",
            got=f"an object of type {type(fn).__name__}",
            fix="write `flops_of(model, batch)`, with the arguments after the function",
        )
    counter = FlopCounterMode(display=False, custom_mapping=_attention_formulas())
    # Without compiled graphs, whose kernels the counter does not see.
    with torch.compiler.set_stance("force_eager"), counter:
        fn(*args, **kwargs)
    return int(counter.get_total_flops())


def _attention_formulas() -> dict[Any, Callable[..., int]]:
    """Return the formulas of attention that replace those of PyTorch's counter.

    It has none for the kernel of the CPU. Of fused kernels it counts that backward computes the
    scores a second time, so one model would have several counts.
    """
    from torch.utils.flop_counter import sdpa_flop_count

    # The counter passes shapes instead of tensors, and that of the output by keyword.
    def forward(q: Shape, k: Shape, v: Shape, *args: object, **kwargs: object) -> int:
        return sdpa_flop_count(q, k, v)

    # A product has two gradients, each as large as the product.
    def backward(grad: Shape, q: Shape, k: Shape, v: Shape, *args: object, **kwargs: object) -> int:
        return 2 * sdpa_flop_count(q, k, v)

    # Forward of the fused kernels of accelerators is right in PyTorch's table.
    aten = torch.ops.aten
    return {
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
        aten._scaled_dot_product_flash_attention_backward: backward,
        aten._scaled_dot_product_efficient_attention_backward: backward,
        aten._scaled_dot_product_cudnn_attention_backward: backward,
    }
