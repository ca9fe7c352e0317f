"""Whether a new process can import the main module, and would call `faccel.launch` again."""

from __future__ import annotations

import ast
import inspect
import os
import sys
import tokenize
from types import FrameType

from faccel.errors import LaunchError


def is_importable() -> bool:
    """Return whether a spawned process imports the main module: not that of a notebook or a prompt.

    Effects: ambient. Reads `sys.modules`.
    """
    main = sys.modules["__main__"]
    # The two cases of `multiprocessing.spawn.get_preparation_data`. Of a script on standard input
    # the name is `<stdin>`.
    return main.__spec__ is not None or os.path.isfile(getattr(main, "__file__", ""))


def check_guarded() -> None:
    """Raise if the running line of the main module would run again when a process imports it.

    Effects: ambient. Reads the main module's file.

    Raises:
        LaunchError: The line is at the top level, in no `if`.
    """
    frame = _main_frame(inspect.currentframe())
    # Called from another module, which a new process imports without calling anything.
    if frame is None or not is_importable():
        return
    try:
        with tokenize.open(frame.f_code.co_filename) as file:
            module = ast.parse(file.read())
    except (OSError, SyntaxError):
        return  # changed since it started, or not Python, as an executable archive
    # Any `if` may be a guard. If it is none, the launched process raises the same error.
    for node in ast.walk(module):
        is_around = isinstance(node, ast.If) and node.lineno <= frame.f_lineno <= _end(node)
        if is_around:
            return
    raise LaunchError(
        "`faccel.launch` is called while the script is imported, and each process imports it again",
        got=f"the top level of {frame.f_code.co_filename}, line {frame.f_lineno}",
        fix='put the call below `if __name__ == "__main__":`',
    )


def _end(node: ast.If) -> int:
    return node.end_lineno or node.lineno


def _main_frame(frame: FrameType | None) -> FrameType | None:
    """Return the frame of the main module's top level among the callers."""
    main = vars(sys.modules["__main__"])
    while frame is not None:
        if frame.f_code.co_name == "<module>" and frame.f_globals is main:
            return frame
        frame = frame.f_back
    return None
