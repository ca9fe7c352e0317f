"""Converts Accelerate's section for fp8 to arguments of `Plan`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from faccel.launching.accelerate_plan import Arguments, is_true, whole_number

# Returns the arguments for a value, none if faccel does the same without one, or None if it has no
# equivalent.
_Convert = Callable[[Any], Arguments | None]


def _all_gather(value: object) -> Arguments:
    if is_true(value):
        return {}
    return {"fp8.all_gather": False}


def _only_true(value: object) -> Arguments | None:
    return {} if is_true(value) else None


def _in_eval(value: object) -> Arguments:
    return {"fp8.te.in_eval": is_true(value)}


def _format(value: object) -> Arguments | None:
    word = str(value).lower()
    # The default of Accelerate, which it leaves to Transformer Engine: MXFP8 is in e4m3 then.
    if word == "hybrid":
        return {}
    if word == "e4m3":
        return {"fp8.te.format": word}
    return None  # Transformer Engine does not train in e5m2 alone


def _margin(value: object) -> Arguments:
    margin = whole_number("margin", value)
    return {"fp8.te.margin": margin} if margin else {}


def _amax_history(value: object) -> Arguments:
    length = whole_number("amax_history_len", value, minimum=1)
    if length == 1024:  # the default of Transformer Engine
        return {}
    return {"fp8.te.amax_history": length}


def _amax(value: object) -> Arguments | None:
    word = str(value).lower()
    if word == "most_recent":
        return {"fp8.te.amax": word}
    return {} if word == "max" else None


def _interval(value: object) -> Arguments | None:
    # Transformer Engine never read another one, and has no such argument from version 2.3.
    return {} if str(value) == "1" else None


def _override(value: object) -> Arguments | None:
    # A list or text such as "(false, false, false)". Version 2 has no such argument.
    words = re.findall(r"\w+", str(value).lower())
    return None if any(is_true(word) for word in words) else {}


_TORCHAO: Mapping[str, _Convert] = {
    "enable_fsdp_float8_all_gather": _all_gather,
    "pad_inner_dim": _only_true,  # always
}
_TE: Mapping[str, _Convert] = {
    "use_autocast_during_eval": _in_eval,
    "fp8_format": _format,
    "interval": _interval,
    "override_linear_precision": _override,
}
# `accelerate config` writes two of the names otherwise than `TERecipeKwargs`.
_HISTORY: Mapping[str, _Convert] = {
    "margin": _margin,
    "amax_history_len": _amax_history,
    "amax_history_length": _amax_history,
    "amax_compute_algo": _amax,
    "amax_compute_algorithm": _amax,
}


def convert_fp8(section: Arguments) -> Arguments:
    """Return the arguments of `Plan` for a section, and remove the keys that have an equivalent.

    Effects: updates section.

    Args:
        section: The section `fp8_config`. Keys may have the prefix `fp8_`.

    Raises:
        ConfigError: A number is invalid.

    Examples:
        >>> section = {"backend": "TE", "fp8_format": "E4M3", "interval": 2}
        >>> convert_fp8(section)["fp8.te.format"], section
        ('e4m3', {'interval': 2})
    """
    key = _key(section, "backend")
    backend = str(section.get(key, "ao")).lower()
    if backend not in _BACKENDS:  # MS-AMP, which is reported with its options
        return {}
    section.pop(key, None)
    return _BACKENDS[backend](section)


def _torchao(section: Arguments) -> Arguments:
    return _converted(section, _TORCHAO)


def _transformer_engine(section: Arguments) -> Arguments:
    # Accelerate's recipe, and its precision of evaluation.
    arguments: Arguments = {"fp8.backend": "te", "fp8.recipe": "delayed", "fp8.te.in_eval": False}
    if is_true(section.pop(_key(section, "use_mxfp8_block_scaling"), None)):
        arguments["fp8.recipe"] = "mxfp8"
        without_history = {key: _without_history(convert) for key, convert in _HISTORY.items()}
        return arguments | _converted(section, {**_TE, **without_history})
    return arguments | _converted(section, {**_TE, **_HISTORY})


def _without_history(convert: _Convert) -> _Convert:
    """Return the conversion of an option that has no effect on MXFP8, for its default only."""
    return lambda value: {} if convert(value) == {} else None


def _key(section: Arguments, name: str) -> str:
    """Return the key of a name, "" if it is missing: `format` and `fp8_format` are one."""
    for key in (name, f"fp8_{name}", name.removeprefix("fp8_")):
        if key in section:
            return key
    return ""


def _converted(section: Arguments, table: Mapping[str, _Convert]) -> Arguments:
    arguments: Arguments = {}
    for name, convert in table.items():
        key = _key(section, name)
        if not key:
            continue
        converted = convert(section[key])
        if converted is not None:
            arguments |= converted
            del section[key]
    return arguments


_BACKENDS: Mapping[str, Callable[[Arguments], Arguments]] = {
    "ao": _torchao,
    "te": _transformer_engine,
}
