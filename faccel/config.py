"""What the user asks for: one frozen record, resolved purely from its sources, that says where each value came from."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import attrs

from faccel.config_file import VARIABLE, ConfigFile
from faccel.errors import ConfigError, nearest
from faccel.mesh import MeshSpec

PRECISIONS = ("no", "bf16", "fp16")
STRATEGIES = ("deepspeed",)
"""Engines that can be asked for instead of the one that the mesh chooses."""

PREFIX = "FACCEL_"
LAUNCH = "FACCEL_LAUNCH"
"""Where `faccel launch` tells its ranks its flags, as JSON: stronger than the environment, which stays as it was."""

_TRUE = ("1", "true", "yes", "on")
_FALSE = ("0", "false", "no", "off")


def _parse_bool(text: str) -> bool:
    word = text.strip().lower()
    if word not in _TRUE + _FALSE:
        raise ValueError(f"not one of {', '.join(_TRUE + _FALSE)}")
    return word in _TRUE


def _bad(name: str, value: object, want: str, fix: str) -> ConfigError:
    return ConfigError(f"`{name}` must be {want}", got=repr(value), fix=fix)


def _one_of(*allowed: str) -> Callable[[Any, Any, Any], None]:
    def check(_: Any, attribute: Any, value: Any) -> None:
        if value not in allowed:
            listed = ", ".join(f"`{word}`" for word in allowed)
            raise _bad(attribute.name, value, f"one of {listed}", nearest(str(value), allowed))

    return check


def _number(kind: type, *, at_least: float) -> Callable[[Any, Any, Any], None]:
    def check(_: Any, attribute: Any, value: Any) -> None:
        fits = isinstance(value, (int, kind)) and not isinstance(value, bool)
        if not fits or not at_least <= value < math.inf:
            want = f"{'a number' if kind is float else 'an int'} of at least {at_least}"
            raise _bad(attribute.name, value, want, f"write `{attribute.name}={at_least}` or more")

    return check


def _flag(_: Any, attribute: Any, value: Any) -> None:
    if not isinstance(value, bool):
        raise _bad(attribute.name, value, "True or False", f"write `{attribute.name}=True`")


def _text_or_none(_: Any, attribute: Any, value: Any) -> None:
    if value is not None and not isinstance(value, str):
        raise _bad(attribute.name, value, "text or None", f'write `{attribute.name}="..."`')


def _text(_: Any, attribute: Any, value: Any) -> None:
    if not isinstance(value, str) or not value:
        raise _bad(attribute.name, value, "text", f'write `{attribute.name}="runs"`')


def _device_name(value: Any) -> Any:
    return (
        str(value) if type(value).__name__ == "device" else value
    )  # torch.device, without importing torch


def _strategy(_: Any, attribute: Any, value: Any) -> None:
    if value is not None:
        _one_of(*STRATEGIES)(_, attribute, value)


def _stage(_: Any, attribute: Any, value: Any) -> None:
    if value is not None and (isinstance(value, bool) or value not in (0, 1, 2, 3)):
        raise _bad(attribute.name, value, "0, 1, 2 or 3", "write `zero=2`")


def _word(value: Any) -> Any:
    return "no" if value is False else value  # what YAML takes `no` for


def _mesh(value: Any) -> MeshSpec | None:
    return None if value is None else MeshSpec.of(value)


def _field(default: Any, parse: Callable[[str], Any], doc: str, **options: Any) -> Any:
    return attrs.field(default=default, metadata={"parse": parse, "doc": doc}, **options)


@attrs.frozen(kw_only=True)
class Config:
    """What a run asks for. Every field can come from `FACCEL_<NAME>` in the environment or an argument of `init`.

    Args:
        mixed_precision: `"no"`, `"bf16"` or `"fp16"`: the dtype of forward and backward; parameters stay fp32.
        grad_accum: MicroBatch-batches per update, the default `size` of `windows`.
        seed: Seed of the data order and of `seed_everything`.
        device: `"cpu"`, `"cuda"`, `"cuda:1"`, ...; None takes the best there is.
        mesh: A `MeshSpec`, a mapping of its fields or text like `"dp_replicate=4"`; None replicates over the world.
        strategy: `"deepspeed"`: an engine instead of the one that the mesh chooses.
        zero: What DeepSpeed shares over the data ranks: 1 optimizer states, 2 gradients too, 3 parameters too;
            0 nothing. None is 2.
        device_placement: Whether models and batches are moved to the device.
        debug: Whether ranks compare call, shapes, dtypes and line before each collective of faccel's; slow.
        run_dir: Where trackers put their folders.
        timeout_s: Seconds until a collective that somebody does not join fails.
        sources: For each field, where its value came from (filled by `resolve`).
    """

    mixed_precision: str = _field("no", str, "dtype of forward and backward", validator=_one_of(*PRECISIONS),
                                 converter=_word)  # fmt: skip
    grad_accum: int = _field(1, int, "micro-batches per update", validator=_number(int, at_least=1))
    seed: int = _field(0, int, "seed of the data order", validator=_number(int, at_least=0))
    device: str | None = _field(
        None, str, "device of this process", validator=_text_or_none, converter=_device_name
    )
    mesh: MeshSpec | None = _field(None, str, "ranks per axis of parallelism", converter=_mesh)
    strategy: str | None = _field(None, str, "engine instead of the mesh's", validator=_strategy)
    zero: int | None = _field(None, int, "ZeRO stage of DeepSpeed, 0 to 3", validator=_stage)
    device_placement: bool = _field(True, _parse_bool, "move models and batches", validator=_flag)
    debug: bool = _field(
        False, _parse_bool, "compare ranks before each collective", validator=_flag
    )
    run_dir: str = _field("runs", str, "folder of the trackers", validator=_text)
    timeout_s: float = _field(
        600.0, float, "seconds until a collective fails", validator=_number(float, at_least=1)
    )
    sources: Mapping[str, str] = attrs.field(factory=dict, eq=False, repr=False)

    def explain(self) -> str:
        """Return one line per field: its value, and where it came from.

        Examples:
            >>> print(resolve(env={"FACCEL_SEED": "7"}).explain().splitlines()[2])
            seed = 7  (environment FACCEL_SEED, over default 0)
        """
        return "\n".join(
            f"{field.name} = {_show(getattr(self, field.name))}  ({self.sources.get(field.name, 'argument')})"
            for field in config_fields()
        )


def _show(value: object) -> str:
    if isinstance(value, MeshSpec):
        return ",".join(f"{axis}={n}" for axis, n in attrs.asdict(value).items() if n != 1) or "1"
    return str(value)


def config_fields() -> tuple[attrs.Attribute[Any], ...]:
    """Return the fields that a user can set, in order.

    Effects: pure.
    """
    return tuple(field for field in attrs.fields(Config) if field.name != "sources")


def field_table() -> str:
    """Return the fields as a Markdown table: key of a file and argument of `init`, flag, variable, default, meaning.

    Effects: pure.
    """
    rows = [
        f"| `{f.name}` | `{flag_of(f.name)}` | `{PREFIX}{f.name.upper()}` | `{_show(f.default)}` "
        f"| {f.metadata['doc']} |"
        for f in config_fields()
    ]
    return "\n".join(
        [
            "| key, argument | flag | variable | default | |",
            "| --- | --- | --- | --- | --- |",
            *rows,
        ]
    )


def unreadable(name: str, field: attrs.Attribute[Any], text: str, error: ValueError) -> ConfigError:
    """Return the error of a text that is not what a field takes."""
    kind = {int: "a whole number", float: "a number"}.get(field.metadata["parse"], str(error))
    fix = f"write for example `{field.name}={_show(field.default)}`"
    return ConfigError(f"{name} cannot be read as {kind}", got=repr(text), fix=fix)


def _from_environment(env: Mapping[str, str]) -> dict[str, tuple[Any, str]]:
    fields = {PREFIX + field.name.upper(): field for field in config_fields()}
    found: dict[str, tuple[Any, str]] = {}
    for key in sorted(
        key for key in env if key.startswith(PREFIX) and env[key]
    ):  # empty is unset, as in a shell
        if key in (LAUNCH, VARIABLE):
            continue
        if key not in fields:
            raise ConfigError(
                f"the environment variable `{key}` means nothing to faccel",
                fix=nearest(key, fields),
            )
        field = fields[key]
        try:
            value = field.metadata["parse"](env[key])
        except ValueError as error:
            raise unreadable(f"the environment variable `{key}`", field, env[key], error) from None
        found[field.name] = (value, f"environment {key}")
    return found


def _from_file(file: ConfigFile | None) -> dict[str, tuple[Any, str]]:
    return (
        {}
        if file is None
        else {key: (value, f"file {file.name}") for key, value in file.values.items()}
    )


def _from_flags(env: Mapping[str, str]) -> dict[str, tuple[Any, str]]:
    flags = launcher_flags(env)
    flags.pop("config", None)
    return {name: (value, f"flag {flag_of(name)}") for name, value in flags.items()}


def launcher_flags(env: Mapping[str, str]) -> dict[str, Any]:
    """Return what `faccel launch` was given: fields, and `config`, the file that was named.

    Effects: pure.

    Raises:
        ConfigError: Something else than the launcher has set the variable.
    """
    try:
        return dict(json.loads(env.get(LAUNCH) or "{}"))
    except (ValueError, TypeError):
        fix = "unset it: `faccel launch` sets it for its ranks"
        raise ConfigError(
            f"`{LAUNCH}` is not what the launcher writes", got=repr(env[LAUNCH]), fix=fix
        ) from None


def flag_of(name: str) -> str:
    """Return the launcher's flag for a field."""
    return f"--{name.replace('_', '-')}"


def _from_record(config: Config | Mapping[str, Any] | None) -> dict[str, tuple[Any, str]]:
    if config is None:
        return {}
    if isinstance(config, Config):
        given = {f.name: getattr(config, f.name) for f in config_fields()}
        return {
            name: (value, "argument config")
            for name, value in given.items()
            if _is_given(config, name)
        }
    if not isinstance(config, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError(
            "a configuration is a `Config` or a mapping of its fields",
            got=repr(config),
            fix="write `faccel.init(faccel.Config(seed=1))` or `faccel.init(seed=1)`",
        )
    return {key: (value, "argument config") for key, value in config.items()}


def _is_given(config: Config, name: str) -> bool:
    """Whether a record asks for a field: it was resolved from a source, or differs from the default."""
    if config.sources:
        return config.sources.get(name, "default") != "default"
    return getattr(config, name) != getattr(Config(), name)


def resolve(
    config: Config | Mapping[str, Any] | None = None,
    *,
    env: Mapping[str, str] | None = None,
    overrides: Mapping[str, Any] | None = None,
    file: ConfigFile | None = None,
) -> Config:
    """Merge the sources, weakest first: defaults, `file`, environment, the launcher's flags, `config`, `overrides`.

    Effects: pure. Neither reads nor writes the process environment, or a file.

    Args:
        config: A record or mapping; of a record that was resolved only the fields that had a source count, of
            any other those that differ from the defaults.
        env: The environment, of which names that start with `FACCEL_` are read; an empty value is none.
        overrides: Single fields.
        file: What a configuration file says.

    Returns:
        The record; its `sources` say for each field where it came from and what it overrode.

    Raises:
        ConfigError: An unknown name (with the nearest right one), a wrong type, an impossible value, each with the
            source that says so; or a flag of the launcher that an argument contradicts.

    Examples:
        >>> resolve({"grad_accum": 4}, env={"FACCEL_GRAD_ACCUM": "2"}).sources["grad_accum"]
        'argument config, over environment FACCEL_GRAD_ACCUM 2'
    """
    names = {field.name: field.default for field in config_fields()}
    values: dict[str, Any] = dict(names)
    sources = dict.fromkeys(names, "default")
    flags = _from_flags(env or {})
    layers = (
        _from_file(file),
        _from_environment(env or {}),
        flags,
        _from_record(config),
        {key: (value, "argument") for key, value in (overrides or {}).items()},
    )
    for layer in layers:
        for key, (value, source) in layer.items():
            if key not in names:
                where = "" if source.startswith("argument") else f" ({source})"
                raise ConfigError(
                    f"`{key}` is not a field of the configuration{where}", fix=nearest(key, names)
                )
            weaker = sources[key].partition(",")[0]
            if key in flags and source.startswith("argument"):
                _check_agrees(key, flags[key], (value, source))
            sources[key] = f"{source}, over {weaker} {_show(values[key])}"
            values[key] = value
    try:
        return Config(**values, sources=sources)
    except ConfigError as error:
        raise _with_source(error, sources) from None


def _check_agrees(name: str, flag: tuple[Any, str], argument: tuple[Any, str]) -> None:
    """Refuse an argument of the script that says something else than the launcher was told."""
    first, second = (getattr(Config(**{name: value}), name) for value, _ in (flag, argument))
    if first != second:
        raise ConfigError(
            f"the script and the launcher contradict each other about `{name}`",
            got=f"{flag[1]} {_show(first)}, {argument[1]} {_show(second)}",
            fix=f"leave out `{flag_of(name)}`, or take `{name}` out of the call of `faccel.init`",
        )


def _with_source(error: ConfigError, sources: Mapping[str, str]) -> ConfigError:
    """Return the error of a field with the source that its value came from."""
    name = next((name for name in sources if error.problem.startswith(f"`{name}` ")), "mesh")
    source = sources[name].partition(",")[0]
    got = error.got if source == "argument" else f"{error.got or 'it'}, from the {source}"
    return ConfigError(error.problem, got=got, fix=error.fix)
