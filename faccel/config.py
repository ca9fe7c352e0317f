"""The configuration: a frozen record that stores each value and the source of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import attrs

from faccel.checks import integer, one_of
from faccel.errors import ConfigError, short_repr, short_text
from faccel.mesh import MeshSpec
from faccel.validators import Validator, boolean, choice, float_at_least, folder, int_at_least, text

if TYPE_CHECKING:
    from faccel.plan import Plan
    from faccel.plan_units import Compile

PRECISIONS = ("no", "bf16", "fp16", "fp8", "bf16-true", "fp16-true")
MATMUL_PRECISIONS = ("highest", "high", "medium")
STRATEGIES = ("deepspeed", "megatron")
"""Engines that replace the strategy that the mesh chooses."""

_AXES = ", ".join(field.name for field in attrs.fields(MeshSpec))

PREFIX = "FACCEL_"
LAUNCH = "FACCEL_LAUNCH"
"""The variable by which `faccel launch` passes its flags to the ranks, as JSON.

Flags are stronger than the environment, so they are not written into the single variables.
"""

_TRUE = ("1", "true", "yes", "on")
_FALSE = ("0", "false", "no", "off")


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


def _to_plan(value: Plan | Mapping[str, object] | str | None) -> Plan | None:
    if value is None:
        return None
    # Imported here, because the records of a plan are a tenth of `import faccel`.
    from faccel.plan_values import to_plan

    return to_plan(value)


def _to_compile(value: Compile | Mapping[str, object] | str | None) -> Compile | None:
    if value is None:
        return None
    from faccel.plan_values import to_compile

    return to_compile(value)


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
        mixed_precision: `"no"`, `"bf16"` or `"fp16"`: the dtype of forward and backward. `"fp8"`:
            bf16, and linear layers in fp8. Parameters stay fp32 in these. `"bf16-true"` and
            `"fp16-true"` cast parameters and inputs instead.
        grad_accum: Micro-batches per step, the default `size` of `windows`.
        seed: Seed of the data order and of `seed_everything`.
        device: `"cpu"`, `"cuda:1"`, `"tpu"`, ...; None is the accelerator, or the CPU without one.
        mesh: A `MeshSpec`, a mapping of its fields or a text such as `"dp_replicate=4"`. None
            replicates over the world.
        strategy: `"deepspeed"` or `"megatron"` replaces the strategy that the mesh chooses.
        zero: Stage of ZeRO under `strategy`: 1 shards optimizer states over the data ranks, 2
            gradients too, 3 parameters too, 0 nothing. None is 2 for DeepSpeed, and 0 for Megatron,
            which has 0 and 1.
        plan: The `Plan` of each `wrap` that gets none: a `Plan`, a mapping of its fields, or text
            such as `"units=Block,fsdp.prefetch=1"`.
        cp_layout: Which part of a sequence a rank of the axis `cp` has: `"contiguous"`, or
            `"head-tail"`, with which causal attention takes all ranks equally long.
        compile: The `compile` of each plan that has none: `"whole"`, `"units"`, a `Compile`, or its
            fields as a mapping or text such as `"what=units,mode=max-autotune"`.
        device_placement: Whether models and batches are moved to the device.
        debug: Whether ranks compare call, shapes, dtypes and call site before each collective of
            faccel. Slow.
        matmul_precision: How fp32 matrices are multiplied, as in
            `torch.set_float32_matmul_precision`; None leaves PyTorch's setting. Until `shutdown`.
        deterministic: Whether a kernel whose results differ between runs raises, as in
            `torch.use_deterministic_algorithms`. Until `shutdown`.
        comm_backend: The c10d backend for tensors of the device; None is the library that is
            registered for it. Objects and counters use gloo.
        run_dir: Folder in which trackers create their folders.
        timeout_s: Seconds until a collective fails that one of the ranks does not call.
        start_timeout_s: Seconds in which all processes must start and connect; None is `timeout_s`.
        sources: Where the value of each field comes from (filled in by `resolve`).
    """

    mixed_precision: str = _field(
        "no",
        str,
        "dtype of forward and backward: no, bf16, fp16, fp8; of parameters: bf16-true, fp16-true",
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
    zero: int | None = _field(
        None, int, "ZeRO stage of DeepSpeed, 0 to 3, or Megatron, 0 or 1", validator=_check_zero
    )
    plan: Plan | None = _field(
        None,
        str,
        "how models run, as in `units=Block,activation_checkpoint=full,offload=true`",
        converter=_to_plan,
    )
    cp_layout: str = _field(
        "contiguous",
        str,
        "part of a sequence that a rank of `cp` has: contiguous, or head-tail for causal attention",
        validator=choice("contiguous", "head-tail"),
    )
    compile: Compile | None = _field(
        None,
        str,
        "what is compiled: whole, units, or as in `what=units,mode=max-autotune`",
        converter=_to_compile,
    )
    device_placement: bool = _field(
        True, _parse_bool, "move models and batches", validator=boolean()
    )
    debug: bool = _field(
        False, _parse_bool, "compare ranks before each collective", validator=boolean()
    )
    matmul_precision: str | None = _field(
        None,
        str,
        "fp32 matrix products: highest (fp32), high (TF32) or medium (bf16)",
        validator=choice(*MATMUL_PRECISIONS, optional=True),
    )
    deterministic: bool = _field(
        False, _parse_bool, "kernels with equal results in every run", validator=boolean()
    )
    comm_backend: str | None = _field(
        None,
        str,
        "c10d backend for tensors of the device, such as gloo or ucc",
        validator=text("gloo", optional=True),
    )
    run_dir: str = _field("runs", str, "folder of the trackers", validator=folder("runs"))
    timeout_s: float = _field(
        600.0, float, "seconds until a collective fails", validator=float_at_least(1)
    )
    start_timeout_s: float | None = _field(
        None,
        float,
        "seconds in which all processes must start; the default is `timeout_s`",
        validator=float_at_least(1, optional=True),
    )
    # Not compared: equal values make equal configurations, wherever they come from.
    sources: Mapping[str, str] = attrs.field(factory=dict, eq=False, repr=False)

    def explain(self) -> str:
        """Return one line per field: its value, and where it comes from.

        Examples:
            >>> from faccel.config_sources import resolve
            >>> print(resolve(env={"FACCEL_SEED": "7"}).explain().splitlines()[2])
            seed = 7  (environment FACCEL_SEED, over default 0)
        """
        lines: list[str] = []
        for field in config_fields():
            # a record that was not made by `resolve` has no sources: its fields are arguments
            source = self.sources.get(field.name, "argument")
            lines.append(f"{field.name} = {text_of(getattr(self, field.name))}  ({source})")
        return "\n".join(lines)


def text_of(value: object) -> str:
    """Return the value of a field as it is printed.

    Effects: pure.

    Examples:
        >>> text_of(MeshSpec(dp_shard=2, tp=2))
        'dp_shard=2,tp=2'
    """
    if type(value).__name__ in ("Plan", "Compile"):  # by name, because few runs import the classes
        from faccel.plan_values import record_text

        return record_text(value)  # pyright: ignore[reportArgumentType]
    if not isinstance(value, MeshSpec):
        return short_text(value)
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
            f"| `{field.name}` | `{flag_of(field.name)}` | `{variable}` "
            f"| `{text_of(field.default)}` | {field.metadata['doc']} |"
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
        got=short_repr(string),
        fix=f"write for example `{field.name}={text_of(field.default)}`",
    )


def is_given(config: Config, name: str) -> bool:
    """Return whether a record sets a field: it has a source, or differs from the default.

    Effects: pure.
    """
    # A resolved record can set a field to its default: `mixed_precision="no"` over a variable.
    if config.sources:
        return config.sources.get(name, "default") != "default"
    return getattr(config, name) != getattr(Config(), name)
