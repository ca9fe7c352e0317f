"""Helper: `examples/gpt.py` as a function of a context."""

import pathlib
import sys

# As a script, it imports the modules beside it by their names.
sys.path.append(str(pathlib.Path(__file__).parents[1] / "examples"))

import gpt

ALL_OPTIONS = ("--tied", "--sequence-parallel", "--activation-checkpoint", "--positions", "learned")


def train(ctx, *words):
    """Return the loss and the gradient norm of the last of two updates."""
    return gpt.train(ctx, gpt.parse(["--steps", "2", "--layers", "2", *words]))
