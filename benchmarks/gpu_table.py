"""The rows that `benchmarks/gpu.py` measures, with their limits. Needs nothing but Python.

The tests of `tests/gpu` are further rows: one each, which passes or fails.
"""

import dataclasses

STEP_LIMIT = 1.03  # of the time of plain PyTorch, for a step that keeps the GPU busy
HOST_LIMIT = 1.25  # for a step that is limited by the host
MEMORY_LIMIT = 1.02
SAVE_LIMIT = 1.5  # PCIe copies 1.5 GB in 30 ms, and the plan of a save takes some milliseconds
LOADING_LIMIT = 1.1


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        name: Unique.
        unit: Of the value.
        ratio_to: What the ratio divides by; "" if the row has no ratio.
        at_most: The limit of the ratio, or of the value where the row has no ratio.
        is_exact: Whether the value is the same in every run, so that it is judged on a CPU, too.
    """

    name: str
    unit: str = "ms"
    ratio_to: str = ""
    at_most: float | None = None
    is_exact: bool = False


def contenders(title, limit, unit="ms"):
    """Return the rows of plain PyTorch, faccel and Accelerate on the same work."""
    return (
        Row(f"{title}: torch", unit),
        Row(f"{title}: faccel", unit, "torch", limit),
        Row(f"{title}: accelerate", unit, "torch"),
    )


def peaks(title):
    """Return the rows of the peak of memory of plain PyTorch and faccel."""
    return (
        Row(f"memory, {title}: torch", "MiB", is_exact=True),
        Row(f"memory, {title}: faccel", "MiB", "torch", MEMORY_LIMIT, is_exact=True),
    )


def synchronisations(title, at_most=0.0):
    """Return the row of how often the host waits for the device in a step."""
    return (Row(f"synchronisations, {title}", "per step", "", at_most, is_exact=True),)


# A measurement fills its rows, and fails or is skipped on its own.
MEASUREMENTS = {
    "step bf16": contenders("GPT step, bf16", STEP_LIMIT),
    "step fp16": contenders("GPT step, fp16", STEP_LIMIT),
    "step compiled": contenders("GPT step, bf16, compiled", STEP_LIMIT),
    "step fp8": contenders("GPT step, fp8 by torchao, compiled", STEP_LIMIT)[:2],
    "step small": contenders("step of a small model, fp32", HOST_LIMIT),
    "step sharded": contenders("GPT step, FSDP2 on a mesh of 1, bf16", STEP_LIMIT)[:2],
    "synchronisations fp32": synchronisations("fp32"),
    "synchronisations bf16": synchronisations("bf16, clipping, a schedule"),
    # `StepInfo.skipped` is a bool: the host reads whether a gradient overflowed.
    "synchronisations fp16": (
        *synchronisations("fp16: torch", None),
        *synchronisations("fp16: faccel", 1.0),
    ),
    "synchronisations loader": synchronisations("bf16, with a loader"),
    "synchronisations windows": synchronisations("bf16, windows of 4 micro-batches, an average"),
    "synchronisations sharded": synchronisations("bf16, FSDP2 on a mesh of 1"),
    "memory step": peaks("a step in bf16"),
    "memory checkpointed": peaks("activation checkpointing"),
    "memory sharded": peaks("FSDP2 on a mesh of 1"),
    "save background": (
        Row("background save: copy of the bytes to the host"),
        Row("background save: the loop is blocked", "ms", "the copy", SAVE_LIMIT),
    ),
    "save durable": (
        Row("durable save: copy to the host, write, fsync"),
        Row("durable save: faccel", "ms", "the raw write", 1.3),
    ),
    "loading one process": contenders(
        "loading, no workers, with the copy to the device", LOADING_LIMIT, "items/s"
    ),
    "loading workers": contenders(
        "loading, workers, with the copy to the device", LOADING_LIMIT, "items/s"
    ),
}
"""The rows of each measurement, in the order in which they run."""
