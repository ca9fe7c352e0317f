"""`TERecipeKwargs(...)` becomes `faccel.parallel.Fp8(backend="te", ...)`."""

from __future__ import annotations

import re
from collections.abc import Mapping

import libcst as cst

from faccel.migration.report import Report
from faccel.migration.syntax import text_of

_PAGE = "docs/low-precision.md#transformer-engine"
# Options of the recipe with a history: the name here, and the code of Transformer Engine's default.
_HISTORY = {
    "margin": ("margin", "0"),
    "amax_history_len": ("amax_history", "1024"),
    "amax_compute_algo": ("amax", '"max"'),
}


def transformer_engine_code(record: Mapping[str, cst.Arg], report: Report) -> str:
    """Return the code of `faccel.parallel.Fp8` for the arguments of `TERecipeKwargs`.

    Effects: updates report.
    """
    codes = {name: _with_double_quotes(text_of(arg.value)) for name, arg in record.items()}
    is_mxfp8 = codes.get("use_mxfp8_block_scaling") == "True"
    config: list[str] = []
    for name, code in codes.items():
        argument = _argument(name, code, is_mxfp8=is_mxfp8)
        if name.startswith("*"):
            report.refuse("`TERecipeKwargs` with `**` arguments", _PAGE)
        elif argument is None:
            report.refuse(f"`{name}={code}` of `TERecipeKwargs`", _PAGE)
        elif argument:
            config.append(argument)
    if "use_autocast_during_eval" not in codes:
        config.append("in_eval=False")
    # Accelerate's recipe, unless MXFP8 is asked for.
    args = ['backend="te"', f'recipe="{"mxfp8" if is_mxfp8 else "delayed"}"']
    if config:
        args.append(f"te=faccel.parallel.TransformerEngineConfig({', '.join(config)})")
    return f"faccel.parallel.Fp8({', '.join(args)})"


def _argument(name: str, code: str, *, is_mxfp8: bool) -> str | None:
    """Return the argument for an option, "" if it needs none, or None if it has no equal."""
    if name == "use_autocast_during_eval":
        return "" if code == "True" else f"in_eval={code}"
    if name == "fp8_format":
        # Accelerate leaves its default, HYBRID, to Transformer Engine.
        return {'"hybrid"': "", '"e4m3"': 'format="e4m3"'}.get(code.lower())
    if name in _HISTORY:
        return _history_argument(*_HISTORY[name], code, is_mxfp8=is_mxfp8)
    if name == "use_mxfp8_block_scaling":
        return "" if code in ("True", "False") else None
    # Without an effect in Transformer Engine.
    if name == "interval" and code == "1":
        return ""
    if name == "override_linear_precision" and set(re.findall(r"\w+", code)) == {"False"}:
        return ""
    return None


def _history_argument(name: str, default: str, code: str, *, is_mxfp8: bool) -> str | None:
    if code.lower() == default:
        return ""
    return None if is_mxfp8 else f"{name}={code}"


def _with_double_quotes(code: str) -> str:
    """Return the code of a literal str in double quotes, and other code as it is."""
    if re.fullmatch(r"'\w*'", code):
        return f'"{code[1:-1]}"'
    return code
