"""How a model is run on its mesh: frozen records of plain values, given to `wrap`."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import attrs

from faccel.errors import ConfigError, nearest

HOOKS = ("bf16", "bf16_powersgd", "fp16", "fp16_powersgd", "powersgd")
"""How gradients may be compressed on their way between the ranks."""


def _hook(_: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    if value is not None and value not in HOOKS:
        raise ConfigError(f"`{attribute.name}` is not a compression of gradients", got=repr(value),
                          fix=nearest(str(value), HOOKS))  # fmt: skip


def _positive(_: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    if value is not None and not (isinstance(value, (int, float)) and value > 0):
        raise ConfigError(
            f"`{attribute.name}` must be positive",
            got=repr(value),
            fix=f"write `{attribute.name}=1`",
        )


def _flag(_: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    if not isinstance(value, bool):
        fix = f"write `{attribute.name}=True`"
        raise ConfigError(f"`{attribute.name}` must be True or False", got=repr(value), fix=fix)


def _names(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def _option(default: bool) -> bool:  # noqa: FBT001
    return attrs.field(default=default, validator=_flag)


@attrs.frozen(kw_only=True)
class PowerSgdConfig:
    """PowerSGD: gradients travel as two thin matrices (Vogels, Karimireddy and Jaggi, 2019).

    Args:
        rank: Columns of the thin matrices; more of them are more exact.
        start_step: Updates that are reduced exactly before compression begins; at least 2 with error feedback or a warm
            start.
        min_compression_rate: A matrix is compressed where that saves at least this factor.
        use_error_feedback: Whether what compression lost is added to the next gradient.
        warm_start: Whether a matrix starts from that of the last update.
        seed: Of the first matrices.
    """

    rank: int = attrs.field(default=1, validator=_positive)
    start_step: int = attrs.field(default=1000, validator=_positive)
    min_compression_rate: float = attrs.field(default=2, validator=_positive)
    use_error_feedback: bool = _option(True)
    warm_start: bool = _option(True)
    seed: int = 0

    def __attrs_post_init__(self) -> None:
        if self.start_step < 2 and (self.use_error_feedback or self.warm_start):
            raise ConfigError(
                "error feedback and a warm start need updates that are reduced exactly before them",
                got=f"start_step={self.start_step}",
                fix="write `start_step=2` or more, or leave both out",
            )


@attrs.frozen(kw_only=True)
class DdpConfig:
    """The options of torch's `DistributedDataParallel`, under its names.

    Args:
        find_unused_parameters: Whether an update may leave out parameters that require gradients; costs a walk over the
            graph in each forward.
        static_graph: Whether every update uses the same parameters in the same order; allows activation checkpointing
            of parameters that are used twice.
        forward_sync_buffers: Whether each training forward starts from rank 0's buffers.
        bucket_cap_mb: Size of the buckets in which gradients travel, in MB; None is torch's choice.
        gradient_as_bucket_view: Whether gradients live in the buckets, which saves a copy.
        skip_all_reduce_unused_params: Whether unused parameters are not reduced; they must be the same on all ranks.
        comm_hook: `"fp16"` or `"bf16"`: gradients travel in that dtype. `"powersgd"`: as thin matrices;
            `"fp16_powersgd"`, `"bf16_powersgd"`: both. None: as they are.
        powersgd: How PowerSGD compresses.
        shard_optimizer: Whether the states of optimizers are spread over the data ranks (ZeRO-1), by torch's
            `ZeroRedundancyOptimizer`: each rank steps for its share of the parameters and sends them to the others.
            `state_dict` of what `wrap_optimizer` returns is collective then, and whole on every rank.
    """

    find_unused_parameters: bool = _option(False)
    static_graph: bool = _option(False)
    forward_sync_buffers: bool = _option(True)
    bucket_cap_mb: float | None = attrs.field(default=None, validator=_positive)
    gradient_as_bucket_view: bool = _option(True)
    skip_all_reduce_unused_params: bool = _option(False)
    comm_hook: str | None = attrs.field(default=None, validator=_hook)
    powersgd: PowerSgdConfig = PowerSgdConfig()
    shard_optimizer: bool = _option(False)


@attrs.frozen(kw_only=True)
class FsdpConfig:
    """The options of torch's FSDP2 (`fully_shard`), for a mesh with `dp_shard`, `cp` or `tp`.

    Args:
        reshard_after_forward: Whether a unit gives its gathered parameters up between forward and backward (ZeRO-3);
            False keeps them (ZeRO-2); a number keeps them spread over that many ranks; None is True but for the root.
        ignored: Patterns of the names of parameters that stay whole on every rank; their gradients are not reduced.
        prefetch: How many units ahead are gathered, in forward and backward; None is torch's choice.
        fp32_units: Patterns of the names of units that compute in fp32 whatever the configured precision.
    """

    reshard_after_forward: bool | int | None = None
    ignored: tuple[str, ...] = attrs.field(default=(), converter=_names)
    prefetch: int | None = attrs.field(default=None, validator=_positive)
    fp32_units: tuple[str, ...] = attrs.field(default=(), converter=_names)


_PLACES = ("cpu",)


def _place(_: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    if value is not None and value not in _PLACES:
        fix = nearest(str(value), _PLACES)
        raise ConfigError(
            f"`{attribute.name}` says where something lives", got=repr(value), fix=fix
        )


def _settings(value: Any) -> Any:
    if isinstance(value, Mapping):
        return MappingProxyType(dict(value))
    if value is None or isinstance(value, str):
        return value
    fix = 'write `settings="ds_config.json"`, or a mapping of what would stand in it'
    raise ConfigError("`settings` is a DeepSpeed configuration", got=repr(value), fix=fix)


@attrs.frozen(kw_only=True)
class DeepSpeedConfig:
    """The options of DeepSpeed, for `strategy="deepspeed"`; the stage is `Config.zero`.

    Args:
        settings: A file of DeepSpeed's JSON, or a mapping of what stands in one. `"auto"` is filled in from the
            `Config` and the model; what contradicts them is an error.
        offload_optimizer: `"cpu"`: where the states of the optimizer live; None is the device.
        offload_params: `"cpu"`: where parameters live that are not needed now (stage 3); None is the device.
    """

    settings: str | Mapping[str, Any] | None = attrs.field(default=None, converter=_settings)
    offload_optimizer: str | None = attrs.field(default=None, validator=_place)
    offload_params: str | None = attrs.field(default=None, validator=_place)

    def __reduce__(self) -> tuple[Any, ...]:
        fields = attrs.asdict(self, recurse=False)
        plain = (
            fields["settings"]
            if isinstance(self.settings, (str, type(None)))
            else dict(self.settings)
        )
        return _deepspeed, (fields | {"settings": plain},)


def _deepspeed(fields: dict[str, Any]) -> DeepSpeedConfig:
    return DeepSpeedConfig(**fields)


@attrs.frozen(kw_only=True)
class ActivationCheckpointing:
    """Activation checkpointing: what forward computed is computed again in backward instead of being kept.

    Args:
        every: Each `every`-th unit is checkpointed; 1 is all of them.
        save_ops: Names of operators whose results are kept, as in `"aten.mm.default"` (selective checkpointing).
        memory_budget: Between 0 (keep nothing) and 1 (keep all): the compiler chooses what is kept; needs `compile`.
    """

    every: int = attrs.field(default=1, validator=_positive)
    save_ops: tuple[str, ...] = attrs.field(default=(), converter=_names)
    memory_budget: float | None = attrs.field(default=None, validator=_positive)


def _checkpointing(value: Any) -> Any:
    if value is None or isinstance(value, ActivationCheckpointing):
        return value
    if value == "full":
        return ActivationCheckpointing()
    if isinstance(value, int) and not isinstance(value, bool):
        return ActivationCheckpointing(every=value)
    fix = 'write `activation_checkpoint="full"`, a number for each n-th unit, or a `faccel.parallel.ActivationCheckpointing(...)`'
    raise ConfigError(
        "`checkpoint` says which units are computed again in backward", got=repr(value), fix=fix
    )


STYLES = ("colwise", "colwise_gather", "colwise_loss", "heads", "replicate", "rowwise", "rowwise_embedding",
          "rowwise_split", "sequence", "sequence_colwise", "sequence_colwise_gather", "sequence_colwise_loss",
          "sequence_embedding", "sequence_rowwise")  # fmt: skip
"""How a module may be cut by tensor parallelism; see `Plan.tensor`."""


def _styles(value: Any) -> Mapping[str, str]:
    if not isinstance(value, Mapping):
        raise ConfigError("`tensor` is a mapping of name patterns to styles", got=repr(value),
                          fix='write `tensor={"blocks.*.up": "colwise", "blocks.*.down": "rowwise"}`')  # fmt: skip
    for pattern, style in value.items():
        if style not in STYLES:
            raise ConfigError(
                f"the style of `{pattern}` is none",
                got=repr(style),
                fix=nearest(str(style), STYLES),
            )
    return MappingProxyType(dict(value))


def _units(value: Any) -> Any:
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value
    if isinstance(value, (str, tuple, list)) and all(isinstance(each, str) for each in value):
        return _names(value)
    fix = 'write `units="Block"`, `units=("blocks.*",)`, or a number of parameters'
    raise ConfigError("`units` names classes or modules, or gives a size", got=repr(value), fix=fix)


SCHEDULES = ("1f1b", "gpipe", "interleaved")


def _schedule(_: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    if value not in SCHEDULES:
        raise ConfigError(
            "the schedule of a pipeline is unknown",
            got=repr(value),
            fix=nearest(str(value), SCHEDULES),
        )


@attrs.frozen(kw_only=True)
class PipelineConfig:
    """How a model is cut into the stages of a pipeline, for a mesh with `pp`.

    Args:
        chain: Patterns of module names that the input passes one after the other, as in `("embed", "blocks.*", "norm",
            "head")`: each takes what the one before returned. All parameters belong to them.
        split: Names of the modules of the chain at which a new stage begins; None balances the parameters.
        schedule: `"1f1b"`, `"gpipe"` or `"interleaved"`, torch's own.
        stages_per_rank: Stages of each rank, more than one for `"interleaved"`.

    A module that is shared by several calls of the chain, or takes more than the module before it returns, cannot be in
    it. Outside of training, tensors with as many rows as the first input are cut with the batch.
    """

    chain: tuple[str, ...] = attrs.field(converter=_names)
    split: tuple[str, ...] | None = attrs.field(
        default=None, converter=attrs.converters.optional(_names)
    )
    schedule: str = attrs.field(default="1f1b", validator=_schedule)
    stages_per_rank: int = attrs.field(default=1, validator=_positive)

    def __attrs_post_init__(self) -> None:
        if self.stages_per_rank > 1 and self.schedule != "interleaved":
            got = f"stages_per_rank={self.stages_per_rank}, schedule={self.schedule!r}"
            fix = 'write `schedule="interleaved"`'
            raise ConfigError("this schedule runs one stage on each rank", got=got, fix=fix)


_COMPILE = ("whole", "units")


def _compile(_: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    if value is not None and value not in _COMPILE:
        fix = nearest(str(value), _COMPILE)
        raise ConfigError("`compile` says what `torch.compile` gets", got=repr(value), fix=fix)


@attrs.frozen(kw_only=True)
class Plan:
    """How `wrap` runs one model; what concerns another strategy than the mesh's is left alone.

    Args:
        ddp: Options of DDP.
        fsdp: Options of FSDP2.
        deepspeed: Options of DeepSpeed.
        units: What is gathered, checkpointed and compiled as one: names of classes (`"Block"`) or patterns of module
            names (`"blocks.*"`), or a number: modules with at least so many parameters. None takes the model's
            `_no_split_modules`, else the members of its `ModuleList`s; what is left over belongs to the root.
        tensor: For a mesh with `tp`: patterns of module names, and how each is cut. `"colwise"` and `"rowwise"` linear
            layers (or embeddings) come in pairs; `"colwise_gather"` gives its whole output to every rank;
            `"colwise_loss"` leaves the logits cut, for `faccel.parallel.loss_parallel`; `"rowwise_embedding"` cuts a vocabulary;
            `"rowwise_split"` takes an input that is whole; `"heads"` is a norm on each rank's own heads of attention;
            `"sequence"` is a norm on a part of the sequence, and `"sequence_colwise"`, `"sequence_rowwise"`,
            `"sequence_embedding"` are those that lie between such parts. All other modules are the same on each rank.
        pipeline: For a mesh with `pp`: how the model is cut into stages.
        activation_checkpoint: `"full"`, a number for each n-th unit, or a `ActivationCheckpointing`.
        compile: `"whole"` or `"units"`: what `torch.compile` gets; None compiles nothing.
        offload: Whether sharded parameters, gradients and optimizer states live in the memory of the host.

    Examples:
        >>> Plan(ddp=DdpConfig(find_unused_parameters=True, comm_hook="fp16")).ddp.comm_hook
        'fp16'
        >>> Plan(units="Block", tensor={"blocks.*.up": "colwise", "blocks.*.down": "rowwise"}).units
        ('Block',)
    """

    ddp: DdpConfig = DdpConfig()
    fsdp: FsdpConfig = FsdpConfig()
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    units: tuple[str, ...] | int | None = attrs.field(default=None, converter=_units)
    tensor: Mapping[str, str] = attrs.field(factory=dict, converter=_styles)
    pipeline: PipelineConfig | None = None
    activation_checkpoint: ActivationCheckpointing | None = attrs.field(
        default=None, converter=_checkpointing
    )
    compile: str | None = attrs.field(default=None, validator=_compile)
    offload: bool = _option(False)

    def __reduce__(self) -> tuple[Any, ...]:
        fields = attrs.asdict(self, recurse=False)
        return _plan, (
            fields | {"tensor": dict(self.tensor)},
        )  # which no one can change, and no one can pickle

    def __attrs_post_init__(self) -> None:
        kinds = {
            "ddp": DdpConfig,
            "fsdp": FsdpConfig,
            "deepspeed": DeepSpeedConfig,
            "pipeline": PipelineConfig,
        }
        for name, kind in kinds.items():
            value = getattr(self, name)
            if not isinstance(value, kind) and (name != "pipeline" or value is not None):
                fix = f"write `{name}=faccel.{kind.__name__}(...)`"
                raise ConfigError(f"`{name}` takes a `{kind.__name__}`", got=repr(value), fix=fix)
        budget = self.activation_checkpoint.memory_budget if self.activation_checkpoint else None
        if budget is not None and (self.compile is None or budget > 1):
            fix = 'write `compile="units"` too, and a budget of at most 1'
            raise ConfigError(
                "a memory budget is kept by the compiler", got=f"memory_budget={budget}", fix=fix
            )


def _plan(fields: dict[str, Any]) -> Plan:
    return Plan(**fields)
