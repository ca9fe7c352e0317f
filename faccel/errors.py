"""The exceptions of faccel: one class per cause, with problem, value and fix as attributes."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

__all__ = [
    "BackendError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DesyncError",
    "DeviceError",
    "DonatedError",
    "FaccelError",
    "JoinError",
    "LaunchError",
    "ModelError",
    "OptimizerError",
    "PurityError",
    "RankFailedError",
    "ScalerError",
    "TopologyError",
    "TreeError",
    "WorldError",
]


class FaccelError(Exception):
    """The base class of the errors that faccel raises on purpose.

    Attributes:
        problem: What is wrong with the value, in one clause that names it.
        got: The value, or an empty string.
        fix: What to do, starting with a verb, or an empty string.
    """

    def __init__(self, problem: str, *, got: str = "", fix: str = "") -> None:
        # Kept apart, so that a caller can add a source or a rank without parsing the message.
        self.problem = problem
        self.got = got
        self.fix = fix
        message = f"{problem}."
        if got:
            message += f" Got {got}."
        if fix:
            message += f"\nTo fix: {fix}."
        Exception.__init__(self, message)  # torch.compile cannot trace `super().__init__` here

    def __str__(self) -> str:
        # Names in a message may come from a file of other origin.
        return printable(Exception.__str__(self))

    # `Exception.__reduce__` calls the class with the message alone, which is not its signature.
    # Process pools, such as those of `concurrent.futures`, return an exception as a pickle.
    def __reduce__(self) -> tuple[Callable[..., FaccelError], tuple[object, ...]]:
        return _rebuild, (type(self), self.problem, self.got, self.fix)


def _rebuild(cls: type[FaccelError], problem: str, got: str, fix: str) -> FaccelError:
    return cls(problem, got=got, fix=fix)


# Each class has a builtin base, so that `except ValueError` or `except RuntimeError` catches it.


class ConfigError(FaccelError, ValueError):
    """A configuration value or an argument is unknown, of the wrong type or out of range."""


class TopologyError(FaccelError, RuntimeError):
    """The environment variables of the launcher are missing or contradict each other."""


class LaunchError(FaccelError, ValueError):
    """A launch is invalid, or the script or function to launch is missing."""


class JoinError(FaccelError, RuntimeError):
    """The nodes of a launch did not all reach the rendezvous, or lost the connection."""


class WorldError(FaccelError, RuntimeError):
    """The process group could not be created, or has been destroyed."""


class DeviceError(FaccelError, RuntimeError):
    """The requested device is unavailable."""


class BackendError(FaccelError, RuntimeError):
    """No strategy supports the combination of mesh and plan."""


class DesyncError(FaccelError, RuntimeError):
    """Ranks disagree about the next collective; lists the call and the call site of each rank."""


class RankFailedError(FaccelError, RuntimeError):
    """Another rank raised while this one waited for it in a collective."""


class TreeError(FaccelError, TypeError):
    """A nested value has a leaf of an unsupported type or shape; names the leaf."""


class DataError(FaccelError, ValueError):
    """A loader, a cursor or a batch is invalid."""


class ModelError(FaccelError, ValueError):
    """A model is invalid or unsupported."""


class OptimizerError(FaccelError, ValueError):
    """An optimizer does not belong to the model, or a step has no gradients."""


class CheckpointError(FaccelError, RuntimeError):
    """A checkpoint cannot be written, is incomplete or corrupt, or does not match the state."""


class PurityError(FaccelError, RuntimeError):
    """A pure function wrote to an argument, or drew from a process-wide random generator."""


class DonatedError(FaccelError, RuntimeError):
    """A state is used again after a step has consumed it."""


class ScalerError(FaccelError, RuntimeError):
    """A `ScalerState` is missing, outdated, or has no `scaled_backward` since the last step."""


_MAX_REPR = 200  # characters
_MAX_TEXT = 300
_MAX_NAMES = 60


class _ShortRepr(reprlib.Repr):
    """`repr` with a limit on nesting, items and characters, so that its cost has a limit, too."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = self.maxdict = 6
        self.maxstring = 120
        self.maxother = _MAX_REPR

    def repr_int(self, x: int, level: int) -> str:
        """Return the number, or its size: Python prints no int of thousands of digits."""
        if x.bit_length() > 128:
            return f"an int of {x.bit_length()} bits"
        return repr(x)


_SHORT_REPR = _ShortRepr()


def short_repr(value: object) -> str:
    """Return the repr of a user's value for a message, shortened to at most 200 characters.

    A value of a configuration file or an argument can be megabytes. Nested lists with aliases can
    have more items than fit in memory.

    Effects: pure.

    Examples:
        >>> short_repr([0] * 1000)
        '[0, 0, 0, 0, 0, 0, ...]'
    """
    # The `__repr__` of a user's class may raise, which must not replace the error of the message.
    try:
        text = _SHORT_REPR.repr(value)
    except Exception:
        return f"an object of type {type(value).__name__}"
    return _without_middle(text, _MAX_REPR)


def short_text(value: object, limit: int = _MAX_TEXT) -> str:
    r"""Return a user's name or text for a message: shortened, with control characters escaped.

    Effects: pure.

    Examples:
        >>> short_text("lr\n\x1b[2J")
        'lr\\n\\x1b[2J'
    """
    if not isinstance(value, str):
        return short_repr(value)
    text = _without_middle(value, limit)
    # A terminal would execute an escape sequence, and a log has one line per message.
    if not text.isprintable():
        text = _without_middle(repr(text)[1:-1], limit)
    return text


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception, the one that it was raised from, and so on; each once.

    PyTorch's pipeline raises a `RuntimeError` from the exception of a stage.

    Effects: pure.
    """
    visited: list[BaseException] = []
    link: BaseException | None = error
    # Python permits a cycle.
    while link is not None and not any(link is other for other in visited):
        yield link
        visited.append(link)
        link = link.__cause__


def summary(error: BaseException) -> str:
    """Return the class of an exception, and the first line of its message.

    Effects: pure.

    Examples:
        >>> summary(KeyError("label"))
        "KeyError: 'label'"
        >>> summary(DataError("`batch` has no rows", fix="read another file"))
        'DataError: `batch` has no rows'
    """
    message = str(error).partition("\n")[0]
    if isinstance(error, FaccelError):
        message = error.problem
    return f"{type(error).__name__}: {message}"


def printable(text: str) -> str:
    r"""Return a text with control characters escaped, except line breaks and tabs.

    A terminal would execute an escape sequence: clear the screen, or hide the lines before.

    Effects: pure.

    Examples:
        >>> printable("a\x1b[2J\nb")
        'a\\x1b[2J\nb'
    """
    if text.isprintable():
        return text
    characters: list[str] = []
    for character in text:
        if not character.isprintable() and character not in "\n\t":
            character = repr(character)[1:-1]
        characters.append(character)
    return "".join(characters)


def _without_middle(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    half = limit // 2 - 2  # the dots take the rest
    return f"{text[:half]}...{text[-half:]}"


def nearest(word: object, allowed: Iterable[str]) -> str:
    """Return a fix that lists `allowed`, with the nearest to `word` first.

    Effects: pure.

    Examples:
        >>> nearest("sun", ["sum", "mean"])
        'use `sum` (allowed: `mean`, `sum`)'
    """
    # sorted, because the order of a set of strings differs from process to process
    names = sorted(allowed)
    listed = ", ".join(f"`{short_text(name)}`" for name in names[:_MAX_NAMES])
    # a model or a file can have thousands of names
    if len(names) > _MAX_NAMES:
        listed += f" and {len(names) - _MAX_NAMES} others"
    # similarity of at least 0.6, so that an unrelated word gets no suggestion
    matches = difflib.get_close_matches(short_text(word), names, n=1)
    if not matches:
        return f"use one of {listed}"
    return f"use `{short_text(matches[0])}` (allowed: {listed})"


ErrorT = TypeVar("ErrorT", bound=FaccelError)


def with_source(error: ErrorT, source: str) -> ErrorT:
    """Return an error about the value of a field with the file or the variable that it is from.

    Effects: pure.

    Args:
        error: The error.
        source: Of `Config.sources`.
    """
    source = source.partition(",")[0]  # without the one that it replaces
    if source in ("argument", "default"):  # the traceback shows the line of an argument
        return error
    got = f"{error.got or 'it'}, from the {source}"
    return type(error)(error.problem, got=got, fix=error.fix)
