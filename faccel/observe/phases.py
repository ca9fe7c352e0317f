"""What a stack shows: the phase of training, the user's line, and the collective it waits in."""

from __future__ import annotations

from faccel.observe.snapshot import Frame, Stack

DATA = "data"
FORWARD = "forward"
BACKWARD = "backward"
OPTIMIZER = "optimizer"
CHECKPOINT = "checkpoint"
COLLECTOR = "garbage collection"
START = "start"
SCRIPT = "script"
"""Code of the script that belongs to no other phase."""

# The start of a path below the folder of packages, and names of functions, or none for all of them.
# The innermost frame of a stack that a row matches decides: a loader may use a module.
_ROWS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("torch/utils/data/", (), DATA),
    ("faccel/data/", (), DATA),
    ("faccel/checkpoint/", (), CHECKPOINT),
    ("torch/distributed/checkpoint/", (), CHECKPOINT),
    ("torch/serialization.py", (), CHECKPOINT),
    ("safetensors/", (), CHECKPOINT),
    ("torch/optim/", (), OPTIMIZER),
    ("faccel/training/step.py", (), OPTIMIZER),
    ("faccel/training/grad_clip.py", (), OPTIMIZER),
    ("torch/autograd/", ("_engine_run_backward", "backward", "grad"), BACKWARD),
    ("torch/_tensor.py", ("backward",), BACKWARD),
    ("faccel/training/backward.py", (), BACKWARD),
    ("torch/nn/modules/module.py", (), FORWARD),
    ("faccel/training/model.py", (), FORWARD),
    ("faccel/runtime/initialize.py", (), START),
)
# Functions of these wait for other ranks.
_COMM = ("faccel/comm/", "torch/distributed/distributed_c10d.py", "torch/distributed/c10d_logger")
_ROOTS = ("torch/", "faccel/", "safetensors/")


def package_path(frame: Frame) -> str:
    """Return the path of a frame of a library below the folder of packages, else nothing.

    Effects: pure.

    Examples:
        >>> package_path(Frame("/usr/lib/site-packages/torch/optim/adam.py", 3, "step", False))
        'torch/optim/adam.py'
    """
    if frame.is_user:
        return ""
    path = frame.file.replace("\\", "/")
    for root in _ROOTS:
        # The last one: an environment may be in a folder of the name `torch`.
        _, separator, tail = path.rpartition(f"/{root}")
        if separator:
            return root + tail
        if path.startswith(root):  # relative to where the process started
            return path
    return ""


def phase_of(stack: Stack) -> str:
    """Return the phase that a stack belongs to.

    Effects: pure.

    Examples:
        >>> step = Frame("/x/torch/optim/adam.py", 3, "step", False)
        >>> phase_of((step, Frame("train.py", 9, "main", True)))
        'optimizer'
    """
    phase = SCRIPT
    for frame in stack:
        row = _phase_of_frame(frame)
        if phase == SCRIPT and row:
            phase = row
        # Activation checkpointing calls modules in the backward.
        if phase == FORWARD and row == BACKWARD:
            return BACKWARD
    return phase


def _phase_of_frame(frame: Frame) -> str:
    path = package_path(frame)
    for start, functions, phase in _ROWS:
        if path.startswith(start) and (not functions or frame.function in functions):
            return phase
    return ""


def site_of(stack: Stack) -> str:
    """Return the innermost line of the user.

    Effects: pure.
    """
    for frame in stack:
        if frame.is_user:
            return frame.site
    return "unknown"


def collective_of(stack: Stack) -> str:
    """Return the function in which a stack waits for other ranks, else nothing.

    It is what the user has called, such as `gather` or `save`, or else the collective itself.

    Effects: pure.
    """
    collective = call = ""
    for frame in stack:
        # A function of the user below a collective, such as a hook, does not wait for ranks.
        if frame.is_user:
            break
        if package_path(frame).startswith(_COMM) and frame.function != "wrapper":
            collective = frame.function
        call = frame.function
    # `model(x)` calls `__call__`, which names nothing.
    if collective and not call.startswith("_") and call != "wrapper":
        return call
    return collective.strip("_")
