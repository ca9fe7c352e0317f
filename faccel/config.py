"""The configuration: a frozen record that stores each value and the source of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import attrs

from faccel.checks import integer, one_of
from faccel.errors import ConfigError, nearest, with_source
from faccel.mesh import MeshSpec
from faccel.validators import Validator, boolean, choice, float_at_least, folder, int_at_least, text

if TYPE_CHECKING:
    from faccel.config_file import ConfigFile

PRECISIONS = ("no", "bf16", "fp16")
STRATEGIES = ("deepspeed",)
"""Engines that replace the strategy that the mesh chooses."""

_AXES = ", ".join(field.name for field in attrs.fields(MeshSpec))

PREFIX = "FACCEL_"
LAUNCH = "FACCEL_LAUNCH"
"""The variable by which `faccel launch` passes its flags to the ranks, as JSON.

Flags are stronger than the environment, so they are not written into the single variables.
"""

_TRUE = ("1", "true", "yes", "on")
_FALSE = ("0", "false", "no", "off")


class _Setting(NamedTuple):
    """The value of a field and its source, such as `"environment FACCEL_SEED"`, `"flag --seed"`."""

    value: Any
    source: str


def _parse_bool(string: str) -> bool:
    word = string.strip().lower()
    if word in _TRUE:
        return True
    if word in _FALSE:
        return False
    raise ValueError(f"one of {', '.join(_TRUE + _FALSE)}")


def _to_precision(value: object) -> object:
    """Return "no" for False: YAML reads an unquoted `no` as False."""
    if value is False:
        return "no"
    return value


def _to_device_name(value: object) -> object:
    """Return the name of a `torch.device`."""
    # The class is compared by name: the command line resolves a configuration without torch.
    if type(value).__name__ == "device":
        return str(value)
    return value


def _to_mesh(value: MeshSpec | Mapping[str, int] | str | None) -> MeshSpec | None:
    if value is None:
        return None
    return MeshSpec.of(value)


def _check_zero(config: object, attribute: object, value: object) -> None:
    if value is None:
        return
    integer("zero", value, at_least=0)  # `one_of` alone accepts True, which is equal to 1
    one_of("zero", value, (0, 1, 2, 3))


def _field(
    default: object,
    parse: Callable[[str], object],
    doc: str,
    *,
    validator: Validator | None = None,
    converter: Callable[[Any], object] | None = None,
) -> Any:
    """Return a field that `parse` reads from the text of an environment variable or a flag."""

    def convert(value: object) -> object:
        if value is None:  # not given
            return default
        if converter is None:
            return value
        return converter(value)

    # `Any`, because a type checker takes the type of a field from its annotation. The metadata is
    # the one source for the flags of `faccel launch`, the variables and docs/configuration.md.
    metadata = {"parse": parse, "doc": doc}
    return attrs.field(default=default, metadata=metadata, validator=validator, converter=convert)


@attrs.frozen(kw_only=True)
class Config:
    """The configuration of a run.

    Each field can be set in a file, by a variable `FACCEL_<NAME>`, or by an argument of `init`.
    None is "not given" for every field: weaker sources apply, or the default.

    Args:
        mixed_precision: `"no"`, `"bf16"` or `"fp16"`: the dtype of forward and backward. Parameters
            stay fp32.
        grad_accum: Micro-batches per step, the default `size` of `windows`.
        seed: Seed of the data order and of `seed_everything`.
        device: `"cpu"`, `"cuda"`, `"cuda:1"`, ...; None is the best available device.
        mesh: A `MeshSpec`, a mapping of its fields or a text such as `"dp_replicate=4"`. None
            replicates over the world.
        strategy: `"deepspeed"` replaces the strategy that the mesh chooses.
        zero: Stage of DeepSpeed: 1 shards optimizer states over the data ranks, 2 gradients too, 3
            parameters too, 0 nothing. None is 2.
        device_placement: Whether models and batches are moved to the device.
        debug: Whether ranks compare call, shapes, dtypes and call site before each collective of
            faccel. Slow.
        run_dir: Folder in which trackers create their folders.
        timeout_s: Seconds until a collective fails that one of the ranks does not call.
        sources: Where the value of each field comes from (filled in by `resolve`).
    """

    mixed_precision: str = _field(
        "no",
        str,
        "dtype of forward and backward: no, bf16 or fp16",
        validator=choice(*PRECISIONS),
        converter=_to_precision,
    )
    grad_accum: int = _field(1, int, "micro-batches per update", validator=int_at_least(1))
    seed: int = _field(0, int, "seed of the data order", validator=int_at_least(0))
    device: str | None = _field(
        None,
        str,
        "device of this process",
        validator=text("cuda:0", optional=True),
        converter=_to_device_name,
    )
    mesh: MeshSpec | None = _field(
        None,
        str,
        f"ranks per axis, as in `dp_shard=2,tp=2`; -1 fills the world. Axes: {_AXES}",
        converter=_to_mesh,
    )
    strategy: str | None = _field(
        None,
        str,
        f"engine instead of the mesh's: {', '.join(STRATEGIES)}",
        validator=choice(*STRATEGIES, optional=True),
    )
    zero: int | None = _field(None, int, "ZeRO stage of DeepSpeed, 0 to 3", validator=_check_zero)
    device_placement: bool = _field(
        True, _parse_bool, "move models and batches", validator=boolean()
    )
    debug: bool = _field(
        False, _parse_bool, "compare ranks before each collective", validator=boolean()
    )
    run_dir: str = _field("runs", str, "folder of the trackers", validator=folder("runs"))
    timeout_s: float = _field(
        600.0, float, "seconds until a collective fails", validator=float_at_least(1)
    )
    # Not compared: equal values make equal configurations, wherever they come from.
    sources: Mapping[str, str] = attrs.field(factory=dict, eq=False, repr=False)

    def explain(self) -> str:
        """Return one line per field: its value, and where it comes from.

        Examples:
            >>> print(resolve(env={"FACCEL_SEED": "7"}).explain().splitlines()[2])
            seed = 7  (environment FACCEL_SEED, over default 0)
        """
        lines: list[str] = []
        for field in config_fields():
            # a record that was not made by `resolve` has no sources: its fields are arguments
            source = self.sources.get(field.name, "argument")
            lines.append(f"{field.name} = {_show(getattr(self, field.name))}  ({source})")
        return "\n".join(lines)


def _show(value: object) -> str:
    if not isinstance(value, MeshSpec):
        return str(value)
    axes: list[str] = []
    for axis, extent in attrs.asdict(value).items():
        if extent != 1:  # an axis of one rank is not used
            axes.append(f"{axis}={extent}")
    return ",".join(axes) or "1"  # a mesh without axes is one process


def config_fields() -> tuple[attrs.Attribute[Any], ...]:
    """Return the fields that a user can set, in order.

    Effects: pure.
    """
    return tuple(field for field in attrs.fields(Config) if field.name != "sources")


def field_table() -> str:
    """Return the fields as a Markdown table: key, flag, variable, default and meaning.

    Effects: pure.
    """
    lines = ["| key, argument | flag | variable | default | |", "| --- | --- | --- | --- | --- |"]
    for field in config_fields():
        variable = PREFIX + field.name.upper()
        lines.append(
            f"| `{field.name}` | `{flag_of(field.name)}` | `{variable}` | `{_show(field.default)}` "
            f"| {field.metadata['doc']} |"
        )
    return "\n".join(lines)


def flag_of(name: str) -> str:
    """Return the launcher's flag for a field.

    Effects: pure.
    """
    return f"--{name.replace('_', '-')}"


def unreadable(
    name: str, field: attrs.Attribute[Any], string: str, error: ValueError
) -> ConfigError:
    """Return the error for a text that cannot be parsed as the value of a field.

    Effects: pure.
    """
    # a ValueError of `int` or `float` does not name the expected type
    expected = {int: "an int", float: "a number"}.get(field.metadata["parse"], str(error))
    return ConfigError(
        f"{name} must be {expected}",
        got=repr(string),
        fix=f"write for example `{field.name}={_show(field.default)}`",
    )


def _environment_settings(env: Mapping[str, str]) -> dict[str, _Setting]:
    from faccel.config_file import VARIABLE  # imported at the first configuration, not before

    fields = {PREFIX + field.name.upper(): field for field in config_fields()}
    settings: dict[str, _Setting] = {}
    # Sorted, so that of several mistakes every rank reports the same one.
    for variable in sorted(env):
        is_other = not variable.startswith(PREFIX) or variable in (LAUNCH, VARIABLE)
        if is_other or not env[variable]:  # an empty variable is unset, as in a shell
            continue
        # An error, because a misspelled variable would otherwise have no effect.
        if variable not in fields:
            raise ConfigError(
                f"the environment variable `{variable}` is unknown",
                got=f"{variable}={env[variable]!r}",
                fix=nearest(variable, fields),
            )
        field = fields[variable]
        try:
            value = field.metadata["parse"](env[variable])
        except ValueError as error:
            name = f"the environment variable `{variable}`"
            raise unreadable(name, field, env[variable], error) from None
        settings[field.name] = _Setting(value, f"environment {variable}")
    return settings


def _file_settings(file: ConfigFile | None) -> dict[str, _Setting]:
    if file is None:
        return {}
    return {name: _Setting(value, file.source(name)) for name, value in file.settings.items()}


def _flag_settings(env: Mapping[str, str]) -> dict[str, _Setting]:
    flags = launcher_flags(env)
    flags.pop("config", None)  # `--config` names the file, which `faccel.init` has read already
    return {name: _Setting(value, f"flag {flag_of(name)}") for name, value in flags.items()}


def launcher_flags(env: Mapping[str, str]) -> dict[str, Any]:
    """Return the flags of `faccel launch`: fields, and `config`, the configuration file.

    Effects: pure.

    Raises:
        ConfigError: The variable was not set by the launcher.
    """
    try:
        # `or`, because an empty variable is unset, as the other variables are
        return dict(json.loads(env.get(LAUNCH) or "{}"))
    except (ValueError, TypeError):
        raise ConfigError(
            f"the environment variable `{LAUNCH}` must be a JSON object",
            got=repr(env[LAUNCH]),
            fix="unset it: `faccel launch` sets it for its ranks",
        ) from None


def _record_settings(config: Config | Mapping[str, object] | None) -> dict[str, _Setting]:
    if config is None:
        return {}
    values: dict[str, Any] = {}
    if isinstance(config, Config):
        # A record has a value for every field. Its defaults must not replace the environment.
        for field in config_fields():
            if is_given(config, field.name):
                values[field.name] = getattr(config, field.name)
    elif isinstance(config, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        values = dict(config)
    else:
        raise ConfigError(
            "`config` must be a `Config` or a mapping of its fields",
            got=repr(config),
            fix="write `faccel.init(faccel.Config(seed=1))` or `faccel.init(seed=1)`",
        )
    return {name: _Setting(value, "argument config") for name, value in values.items()}


def is_given(config: Config, name: str) -> bool:
    """Return whether a record sets a field: it has a source, or differs from the default.

    Effects: pure.
    """
    # A resolved record can set a field to its default: `mixed_precision="no"` over a variable.
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
    """Merge the sources of a configuration into one record.

    From weakest to strongest: defaults, `file`, environment, launcher flags, `config`, `overrides`.
    A value of None counts as not given.

    Effects: pure. Neither reads nor writes the process environment or a file.

    Args:
        config: A record or a mapping. Of a resolved record only the fields with a source count, of
            another record those that differ from the defaults.
        env: The environment. Names that start with `FACCEL_` are read; an empty value is unset.
        overrides: Single fields.
        file: The content of a configuration file.

    Returns:
        The record. Its `sources` store where each value comes from, and which one it replaced.

    Raises:
        ConfigError: A name is unknown, a value is invalid, or an argument contradicts a flag of the
            launcher. The message names the source, and the nearest valid name.

    Examples:
        >>> resolve({"grad_accum": 4}, env={"FACCEL_GRAD_ACCUM": "2"}).sources["grad_accum"]
        'argument config, over environment FACCEL_GRAD_ACCUM 2'
    """
    values: dict[str, Any] = {field.name: field.default for field in config_fields()}
    sources = dict.fromkeys(values, "default")
    flags = _flag_settings(env or {})
    arguments = {name: _Setting(value, "argument") for name, value in (overrides or {}).items()}
    # from the weakest source to the strongest
    layers = (
        _file_settings(file),
        _environment_settings(env or {}),
        flags,
        _record_settings(config),
        arguments,
    )
    for layer in layers:
        for name, setting in layer.items():
            _check_name(name, setting, values)
            # Scripts pass each option of their command line on, whether the user set it or not.
            if setting.value is None:
                continue
            if name in flags and setting.source.startswith("argument"):
                _check_agreement(name, flags[name], setting)
            # Only the source that is replaced is named, not those that it replaced before.
            weaker = sources[name].partition(",")[0]
            sources[name] = f"{setting.source}, over {weaker} {_show(values[name])}"
            values[name] = setting.value
    # Validated once, after the merge: a weak source may have an invalid value that a stronger one
    # replaces.
    try:
        return Config(**values, sources=sources)
    except ConfigError as error:
        raise _with_source(error, sources) from None


def _check_name(name: str, setting: _Setting, fields: Mapping[str, object]) -> None:
    if name in fields:
        return
    problem = f"`{name}` is not a field of the configuration"
    # For an argument the traceback shows the line; a file or a variable must be named.
    if not setting.source.startswith("argument"):
        problem += f" ({setting.source})"
    raise ConfigError(problem, got=f"{name}={setting.value!r}", fix=nearest(name, fields))


def _check_agreement(name: str, flag: _Setting, argument: _Setting) -> None:
    """Raise if an argument of the script contradicts a flag of the launcher.

    Which one should win depends on the user, so neither does.
    """
    flag_value = getattr(Config(**{name: flag.value}), name)  # both as converted by the record
    argument_value = getattr(Config(**{name: argument.value}), name)
    if flag_value == argument_value:
        return
    raise ConfigError(
        f"the script and the launcher contradict each other about `{name}`",
        got=f"{flag.source} {_show(flag_value)}, {argument.source} {_show(argument_value)}",
        fix=f"leave out `{flag_of(name)}`, or remove `{name}` from the call of `faccel.init`",
    )


def _with_source(error: ConfigError, sources: Mapping[str, str]) -> ConfigError:
    """Return the error of a field with the source of its value."""
    # The validators see a value without its source. They begin a message with the field's name.
    field = "mesh"  # whose errors name an axis
    for name in sources:
        if error.problem.startswith(f"`{name}` "):
            field = name
    return with_source(error, sources[field])
