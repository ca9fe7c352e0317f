"""Loss functions that are run up to the call of their model, because it runs elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from faccel.errors import ModelError
from faccel.parallel.eager_code import untraced
from faccel.protocols import MicroBatchLoss
from faccel.tree import Tree


class StoppedCall(BaseException):
    """Carries a value out of a loss function at the call of its model.

    No `Exception`, which the loss function might catch.
    """

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value


def arguments_of_call(loss: MicroBatchLoss) -> tuple[tuple[Tree, ...], Mapping[str, Tree]]:
    """Return the positional and keyword arguments with which a loss function calls its model.

    Raises:
        ModelError: It does not call the model.
    """
    try:
        # The loss function prepares the arguments itself, for example renames them. The exception
        # ends it there: the rest is for the rank that has the output of the model.
        loss(_stop)
    except StoppedCall as stopped:
        return stopped.value
    raise calls_error("no call")


# One function for all calls: a compiled loss function would have a graph for each.
@untraced
def _stop(*args: Tree, **kwargs: Tree) -> NoReturn:
    raise StoppedCall((args, kwargs))


def calls_error(got: str) -> ModelError:
    """Return the error for a loss function that does not call its model once."""
    return ModelError(
        "`loss_fn` must call its model once",
        got=got,
        fix="write `loss_fn(model, batch)` with one `model(...)`, as a pipeline runs it",
    )
