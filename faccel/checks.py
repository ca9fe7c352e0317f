"""Checks of arguments: each returns the value, or raises an error that names it and a fix."""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Collection
from numbers import Real
from typing import TypeGuard, TypeVar

from faccel.errors import ConfigError, FaccelError, nearest, short_repr, short_text

# `scheme://...`. `pathlib.Path` turns the two slashes into one. The drive of a Windows path is one
# letter.
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+")
# The package that adds a file system to fsspec, and the program that mounts it as a folder.
_FSSPEC_PACKAGES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
    "hf": "huggingface_hub",
}
_MOUNTS = {"s3fs": "mount-s3", "gcsfs": "gcsfuse", "adlfs": "blobfuse2"}

MAX_COUNT = 10**9
"""A count of processes, nodes or ranks along an axis is below it."""

_MAX_INT = 2**64  # seeds of torch and NumPy have 64 bits
_MAX_SECONDS = 10**9  # 30 years; from 292 years, timeouts overflow in Python and C++

_SIZE_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
}
T = TypeVar("T")
Number = TypeVar("Number", int, float)


def one_of(
    name: str, value: T, allowed: Collection[T], error: type[FaccelError] = ConfigError
) -> T:
    """Return `value`, which must be one of `allowed`.

    Effects: pure.

    Args:
        name: Name of the argument, for the message.
        value: Its value.
        allowed: The values that are valid.
        error: Class of the error.

    Examples:
        >>> one_of("op", "sun", ("sum", "mean"))
        Traceback (most recent call last):
        faccel.errors.ConfigError: `op` must be one of 'mean', 'sum'. Got 'sun'.
        To fix: use `sum` (allowed: `mean`, `sum`).
    """
    # An unhashable value is compared, not hashed. Arrays of another type are not compared: their
    # `==` returns an array.
    for candidate in allowed:
        if isinstance(value, type(candidate)) and value == candidate:
            return value
    # the reprs are sorted: values of several types, such as None and str, have no order
    listed = ", ".join(sorted(short_repr(candidate) for candidate in allowed))
    fix = nearest(value, [str(candidate) for candidate in allowed])
    raise error(f"`{name}` must be one of {listed}", got=short_repr(value), fix=fix)


def positive(name: str, value: Number, error: type[FaccelError] = ConfigError) -> Number:
    """Return `value`, which must be a number above 0.

    Effects: pure.

    Examples:
        >>> positive("every", 0)
        Traceback (most recent call last):
        faccel.errors.ConfigError: `every` must be positive. Got every=0.
        To fix: use `every=1` or more.
    """
    # The annotation of the user's argument is not checked at run time. NumPy's numbers are `Real`,
    # and not all of them are an int or a float. NaN is not above 0.
    is_real = isinstance(value, int | float | Real)  # pyright: ignore[reportUnnecessaryIsInstance]
    if is_real and value > 0:
        return value
    fix = f"use `{name}=1` or more"
    if isinstance(value, float):
        fix = f"use `{name}=1.0`, or any number above 0"
    raise error(f"`{name}` must be positive", got=f"{name}={short_repr(value)}", fix=fix)


def positive_or_tensor(name: str, value: T, error: type[FaccelError] = ConfigError) -> T:
    """Return `value`, which must be a number above 0, or a 0-d tensor.

    Effects: pure. The value of a tensor is not read: the host would wait for the device.

    Examples:
        >>> positive_or_tensor("clip_norm", 0.0)
        Traceback (most recent call last):
        faccel.errors.ConfigError: `clip_norm` must be positive. Got clip_norm=0.0.
        To fix: use `clip_norm=1.0`, or any number above 0.
    """
    # `ndim` instead of `isinstance`: this module imports neither torch nor NumPy.
    ndim = getattr(value, "ndim", None)
    if ndim is None or isinstance(value, Real):
        positive(name, value, error)  # type: ignore[type-var]
    elif ndim > 0:
        raise error(
            f"`{name}` must be a number or a 0-d tensor",
            got=f"{name}.ndim={ndim}",
            fix=f"use `{name}=1.0`, or a tensor such as `{name}=torch.tensor(1.0)`",
        )
    return value


def integer(
    name: str, value: object, *, at_least: int, error: type[FaccelError] = ConfigError
) -> int:
    """Return `value`, which must be an int and not a bool.

    Effects: pure.

    Examples:
        >>> integer("grad_accum", 0, at_least=1)
        Traceback (most recent call last):
        faccel.errors.ConfigError: `grad_accum` must be an int of at least 1. Got grad_accum=0.
        To fix: use `grad_accum=1` or more.
    """
    # a bool is an int in Python, but `grad_accum=True` is a mistake and not 1
    problem = f"`{name}` must be an int of at least {at_least}"
    if isinstance(value, int) and not isinstance(value, bool):
        if at_least <= value < _MAX_INT:
            return value
        if value >= _MAX_INT:
            problem += " and of at most 64 bits"
    fix = f"use `{name}={at_least}` or more"
    raise error(problem, got=f"{name}={short_repr(value)}", fix=fix)


def parse_count(text: str) -> int | None:
    """Return the number of a text of decimal digits; None for another text or a large number.

    Effects: pure.

    Examples:
        >>> parse_count("16"), parse_count("auto"), parse_count("9" * 5000)
        (16, None, None)
    """
    # `int` raises for thousands of digits, which `isdecimal` accepts
    if text.isdecimal() and len(text) < len(str(MAX_COUNT)):
        return int(text)
    return None


def finite(
    name: str, value: object, *, at_least: float, error: type[FaccelError] = ConfigError
) -> float:
    """Return a number of seconds, which must be finite and not a bool.

    Effects: pure.

    Examples:
        >>> finite("wait_s", float("inf"), at_least=1)
        Traceback (most recent call last):
        faccel.errors.ConfigError: `wait_s` must be a finite number of at least 1. Got wait_s=inf.
        To fix: use `wait_s=1` or more.
    """
    # NaN needs no check: every comparison with it is False.
    problem = f"`{name}` must be a finite number of at least {at_least}"
    if isinstance(value, int | float) and not isinstance(value, bool):
        if at_least <= value <= _MAX_SECONDS:
            return value
        if _MAX_SECONDS < value < math.inf:
            problem += f" and at most {_MAX_SECONDS}"
    fix = f"use `{name}={at_least}` or more"
    raise error(problem, got=f"{name}={short_repr(value)}", fix=fix)


def is_finite(value: object) -> TypeGuard[int | float]:
    """Return whether a value of JSON is a number that a float can have; a bool is none.

    Effects: pure.

    Examples:
        >>> [is_finite(value) for value in (1, 0.5, True, "1", float("nan"), 10**400)]
        [True, True, False, False, False, False]
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    # Integers of JSON have any number of digits. NaN is not within any limits.
    return abs(value) <= sys.float_info.max


def in_range(
    name: str, value: Number, low: Number, high: Number, error: type[FaccelError] = ConfigError
) -> Number:
    """Return `value`, which must lie between `low` and `high`, both included.

    Effects: pure.

    Examples:
        >>> in_range("decay", 1.5, 0.0, 1.0)
        Traceback (most recent call last):
        faccel.errors.ConfigError: `decay` must be between 0.0 and 1.0. Got decay=1.5.
        To fix: use a value such as `decay=1.0`.
    """
    is_real = isinstance(value, int | float | Real)  # pyright: ignore[reportUnnecessaryIsInstance]
    if is_real and low <= value <= high:
        return value
    nearest_valid = low
    if is_real and value > high:
        nearest_valid = high
    raise error(
        f"`{name}` must be between {low} and {high}",
        got=f"{name}={short_repr(value)}",
        fix=f"use a value such as `{name}={nearest_valid}`",
    )


def instance_of(
    name: str,
    value: object,
    expected: type | tuple[type, ...],
    *,
    fix: str,
    error: type[FaccelError] = ConfigError,
) -> None:
    """Raise unless `value` is an instance of `expected`.

    Effects: pure.

    Args:
        name: Name of the argument, for the message.
        value: Its value.
        expected: One class or several.
        fix: What to write instead, starting with a verb.
        error: Class of the error.

    Examples:
        >>> instance_of("loader", 3, list, fix="write `[batch]`")
        Traceback (most recent call last):
        faccel.errors.ConfigError: `loader` must be a list. Got 3, of type int.
        To fix: write `[batch]`.
    """
    if isinstance(value, expected):
        return
    classes = expected if isinstance(expected, tuple) else (expected,)
    names = " or ".join(_with_article(cls.__name__) for cls in classes)
    raise error(f"`{name}` must be {names}", got=shown(value), fix=fix)


def flag_value(name: str, value: T, error: type[FaccelError] = ConfigError) -> T:
    """Return `value`, which must be a bool, a number, or a 0-d tensor or array.

    Effects: pure.

    Examples:
        >>> flag_value("stop", "no")
        Traceback (most recent call last):
        faccel.errors.ConfigError: `stop` must be a bool or a 0-d tensor. Got 'no', of type str.
        To fix: use `stop=False` or `stop=True`.
    """
    if isinstance(value, bool | int | float):
        return value
    # `ndim` instead of `isinstance`: this module imports neither torch nor NumPy.
    ndim = getattr(value, "ndim", None)
    is_text = isinstance(value, str | bytes)  # NumPy's strings are 0-d
    if ndim == 0 and not is_text:
        return value
    problem = f"`{name}` must be a bool or a 0-d tensor"
    if ndim:
        fix = f"use `{name}=value.any()` or `{name}=value.all()`"
        raise error(problem, got=f"{name}.ndim={ndim}", fix=fix)
    raise error(problem, got=shown(value), fix=f"use `{name}=False` or `{name}=True`")


def _with_article(noun: str) -> str:
    if noun[0].lower() in "aeiou":
        return f"an {noun}"
    return f"a {noun}"


def local_path(
    name: str, path: str | os.PathLike[str], error: type[FaccelError] = ConfigError
) -> str:
    """Return `path` as a str; it must be on a file system of this node and not a URL.

    Effects: pure. Python would take `s3://bucket/run` for the relative path of a folder `s3:`.

    Examples:
        >>> local_path("path", "runs/first")
        'runs/first'
        >>> local_path("path", "file:///data/run")
        Traceback (most recent call last):
        faccel.errors.ConfigError: `path` must be a local path, not a URL. Got 'file:///data/run'.
        To fix: write `path="/data/run"`.
    """
    instance_of(name, path, (str, os.PathLike), fix=f'write `{name}="runs"`', error=error)
    text = os.fsdecode(path)  # an entry of `os.scandir(b"...")` has a path of bytes
    if "\0" in text:
        fix = f"remove the null character from `{name}`"
        raise error(f"`{name}` has a null character", got=short_repr(text), fix=fix)
    match = _URL.match(text)
    if match is None:
        return text
    scheme, rest = match[1].lower(), short_text(text[match.end() :])
    fix = f'write `{name}="/{rest}"`'
    if scheme != "file":
        fix = _fix_for_remote(name, scheme, f"{scheme}://{rest}")
    raise error(f"`{name}` must be a local path, not a URL", got=short_repr(text), fix=fix)


def _fix_for_remote(name: str, scheme: str, url: str) -> str:
    package = _FSSPEC_PACKAGES.get(scheme, "fsspec")
    fix = (
        f'write `{name}="local"` and copy the folder, after `pip install {package}`: '
        f'`fsspec.filesystem("{scheme}").put("local", "{url}", recursive=True)`, '
        "and `.get` to read it"
    )
    mount = _MOUNTS.get(package)
    if mount:
        fix += f"; or mount the bucket as a folder with `{mount}`"
    return fix


def shown(value: object, limit: int = 80) -> str:
    """Return a value and its type in one short line, for `got`.

    Effects: pure.

    Examples:
        >>> shown("x" * 100)
        'an object of type str'
    """
    # The repr of a tensor or a model can be megabytes: only plain values are shown.
    text = ""
    if isinstance(value, str | int | float | bool | None):
        text = short_repr(value)
    if not text or len(text) > limit:
        return f"an object of type {type(value).__name__}"
    return f"{text}, of type {type(value).__name__}"


def parse_size(size: str | int, name: str) -> int:
    """Return a size such as `"5GB"` in bytes.

    Effects: pure.

    Args:
        size: The size.
        name: Of the argument, for the message.

    Raises:
        ConfigError: It is not a size.

    Examples:
        >>> parse_size("1.5KB", "size"), parse_size("2 MiB", "size"), parse_size(100, "size")
        (1500, 2097152, 100)
    """
    # decimal units as transformers, and binary ones
    # A file system has 64-bit sizes.
    match = re.fullmatch(r"\s*(\d{1,19}(?:\.\d{1,19})?)\s*([A-Za-z]*)\s*", str(size))
    if match is None or match[2].upper() not in _SIZE_UNITS or float(match[1]) <= 0:
        raise ConfigError(
            f"`{name}` must be a positive size",
            got=short_repr(size),
            fix='write `"5GB"`, `"500MB"` or a number of bytes',
        )
    return int(float(match[1]) * _SIZE_UNITS[match[2].upper()])
