"""How a model runs on its mesh: frozen records of plain values, passed to `wrap`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import attrs

from faccel.checks import instance_of, one_of
from faccel.errors import ConfigError, short_repr
from faccel.plan_units import (
    ActivationCheckpointing,
    Compile,
    Fp8,
    LayerwiseCasting,
    to_activation_checkpoint,
    to_compile,
    to_layerwise_casting,
)
from faccel.validators import bool_field, choice, construct, patterns, positive_number

HOOKS = ("bf16", "bf16_powersgd", "fp16", "fp16_powersgd", "powersgd")
"""Compressions of the gradients that DDP reduces."""

STYLES = (
    "colwise", "colwise_gather", "colwise_loss", "heads", "replicate", "rowwise",
    "rowwise_embedding", "rowwise_split", "sequence", "sequence_colwise",
    "sequence_colwise_gather", "sequence_colwise_loss", "sequence_embedding", "sequence_rowwise",
)  # fmt: skip
"""Ways to shard a module in tensor parallelism; see `Plan.tensor`."""

SCHEDULES = (
    "1f1b", "dualpipev", "gpipe", "interleaved", "interleaved-zero-bubble", "looped-bfs", "zbv",
)  # fmt: skip
"""Pipeline schedules, under PyTorch's names."""

# Their classes in PyTorch run exactly one stage on each rank, or exactly two.
ONE_STAGE_SCHEDULES = ("1f1b", "gpipe")
V_SCHEDULES = ("dualpipev", "zbv")

SPLIT_BACKWARD_SCHEDULES = ("dualpipev", "interleaved-zero-bubble", "zbv")
"""Schedules that compute the gradients of inputs first and those of parameters later."""


@attrs.frozen(kw_only=True)
class PowerSgdConfig:
    """The options of PowerSGD, which reduces each gradient as two low-rank matrices.

    Vogels, Karimireddy, Jaggi: PowerSGD, 2019 (https://arxiv.org/abs/1905.13727).

    Args:
        rank: Number of columns of the two matrices. More are more exact and slower.
        start_step: Number of steps with exact gradients before compression begins. At least 2 with
            error feedback or warm start.
        min_compression_rate: Gradients are compressed if that makes them smaller by at least this
            factor.
        use_error_feedback: Whether the error of the compression is added to the next gradient.
        warm_start: Whether each step starts from the matrices of the step before.
        seed: Seed of the first matrices.
    """

    # The defaults of PyTorch's `PowerSGDState`.
    rank: int = attrs.field(default=1, validator=positive_number())
    start_step: int = attrs.field(default=1000, validator=positive_number())
    min_compression_rate: float = attrs.field(default=2, validator=positive_number())
    use_error_feedback: bool = bool_field(default=True)
    warm_start: bool = bool_field(default=True)
    seed: int = 0

    def __attrs_post_init__(self) -> None:
        needs_exact_steps = self.use_error_feedback or self.warm_start
        if needs_exact_steps and self.start_step < 2:  # PyTorch's hook raises in the first step
            raise ConfigError(
                "`start_step` must be at least 2 with error feedback or warm start",
                got=f"start_step={self.start_step}",
                fix="write `start_step=2`, or `use_error_feedback=False, warm_start=False`",
            )


@attrs.frozen(kw_only=True)
class DdpConfig:
    """The options of `torch.nn.parallel.DistributedDataParallel`, under its names.

    Args:
        find_unused_parameters: Whether a step may leave out parameters that require gradients. DDP
            then traverses the autograd graph after each forward.
        static_graph: Whether every step uses the same parameters in the same order. Allows
            activation checkpointing of parameters that are used twice.
        forward_sync_buffers: Whether each training forward starts with the buffers of rank 0.
        bucket_cap_mb: Size in MB of the buckets that are reduced together; None is DDP's default.
        gradient_as_bucket_view: Whether `.grad` aliases the buckets, which saves a copy of the
            gradients.
        skip_all_reduce_unused_params: Whether unused parameters are not reduced. They must be the
            same on all ranks.
        comm_hook: `"fp16"` or `"bf16"` reduce gradients in that dtype, `"powersgd"` as low-rank
            matrices, `"fp16_powersgd"` and `"bf16_powersgd"` both. None does not compress.
        powersgd: Options of PowerSGD.
        shard_optimizer: Whether optimizer states are sharded over the data ranks (ZeRO-1), with
            `ZeroRedundancyOptimizer`. Each rank steps its shard of the parameters and broadcasts
            them. `state_dict` of the optimizer that `wrap_optimizer` returns is then collective,
            and returns full states on every rank.
    """

    find_unused_parameters: bool = bool_field(default=False)
    static_graph: bool = bool_field(default=False)
    forward_sync_buffers: bool = bool_field(default=True)
    # None and not a number: PyTorch's default (25 MB) has a smaller first bucket, which a number
    # would replace, too.
    bucket_cap_mb: float | None = attrs.field(
        default=None, validator=positive_number(optional=True)
    )
    gradient_as_bucket_view: bool = bool_field(default=True)
    skip_all_reduce_unused_params: bool = bool_field(default=False)
    comm_hook: str | None = attrs.field(default=None, validator=choice(*HOOKS, optional=True))
    # frozen, so that one instance can be the default of all
    powersgd: PowerSgdConfig = PowerSgdConfig()
    shard_optimizer: bool = bool_field(default=False)


@attrs.frozen(kw_only=True)
class FsdpConfig:
    """The options of FSDP2 (`fully_shard`), for a mesh with `dp_shard`, `cp` or `tp`.

    Args:
        reshard_after_forward: Whether a unit frees its gathered parameters between forward and
            backward (ZeRO-3). False keeps them (ZeRO-2). A number keeps them sharded over that many
            ranks. None is True for all but the root.
        ignored: Patterns of the names of parameters that are not sharded. Their gradients are not
            reduced.
        prefetch: Number of units to gather ahead, in forward and backward; None is PyTorch's
            default.
        fp32_units: Patterns of the names of units that compute in fp32, whatever the mixed
            precision.
        low_precision_params: Whether parameters are gathered in the dtype of `mixed_precision`.
            That halves their traffic, and backward keeps no cast copies of them. It is another
            computation than autocast: the inputs of every unit, and the parameters of norms and of
            blocks with `torch.autocast(enabled=False)` are rounded to that dtype, too.
        reduce_dtype: `"bf16"` or `"fp16"` halve the traffic of fp32 gradients, whose sum over the
            ranks is then rounded. None is `"fp32"`.
    """

    reshard_after_forward: bool | int | None = None
    ignored: tuple[str, ...] = attrs.field(default=(), converter=patterns)
    prefetch: int | None = attrs.field(default=None, validator=positive_number(optional=True))
    fp32_units: tuple[str, ...] = attrs.field(default=(), converter=patterns)
    low_precision_params: bool = bool_field(default=False)
    reduce_dtype: str | None = attrs.field(
        default=None, validator=choice("fp32", "bf16", "fp16", optional=True)
    )


def _settings(value: object) -> str | Mapping[str, object] | None:
    if isinstance(value, Mapping):
        # a read-only copy: the record is immutable
        return MappingProxyType(dict(value))
    if value is None or isinstance(value, str):
        return value
    raise ConfigError(
        "`settings` must be the path of a DeepSpeed configuration, or its content as a mapping",
        got=short_repr(value),
        fix='write `settings="ds_config.json"`',
    )


@attrs.frozen(kw_only=True)
class DeepSpeedConfig:
    """The options of DeepSpeed, for `strategy="deepspeed"`; the ZeRO stage is `Config.zero`.

    Args:
        settings: Path of a DeepSpeed JSON file, or its content as a mapping. `"auto"` takes the
            value from the `Config` and the model; a value that contradicts them raises.
        offload_optimizer: `"cpu"` keeps optimizer states in the memory of the host; None on the
            device.
        offload_params: `"cpu"` keeps parameters that are not in use in the memory of the host
            (stage 3); None on the device.
    """

    settings: str | Mapping[str, object] | None = attrs.field(default=None, converter=_settings)
    offload_optimizer: str | None = attrs.field(
        default=None, validator=choice("cpu", optional=True)
    )
    offload_params: str | None = attrs.field(default=None, validator=choice("cpu", optional=True))

    def __reduce__(self) -> tuple[Callable[..., DeepSpeedConfig], tuple[object, ...]]:
        fields = attrs.asdict(self, recurse=False)
        if isinstance(self.settings, Mapping):
            fields["settings"] = dict(self.settings)
        return construct, (DeepSpeedConfig, fields)


def _tensor_styles(value: object) -> Mapping[str, str]:
    if not isinstance(value, Mapping):
        raise ConfigError(
            "`tensor` must be a mapping from name patterns to styles",
            got=short_repr(value),
            fix='write `tensor={"blocks.*.up": "colwise", "blocks.*.down": "rowwise"}`',
        )
    # The patterns are compared with the names of the modules in `wrap`, which has the model.
    for pattern, style in value.items():
        one_of(f'tensor["{pattern}"]', style, STYLES)
    return MappingProxyType(dict(value))


def _units(value: object) -> tuple[str, ...] | int | None:
    if value is None:
        return None
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    if isinstance(value, str):
        return (value,)
    if isinstance(value, tuple | list) and all(isinstance(item, str) for item in value):
        return tuple(value)
    raise ConfigError(
        "`units` must be names of classes or modules, or a number of parameters",
        got=short_repr(value),
        fix='write `units="Block"`, `units=("blocks.*",)` or `units=1_000_000`',
    )


@attrs.frozen(kw_only=True)
class PipelineConfig:
    """How a model is split into pipeline stages, for a mesh with `pp`.

    Args:
        chain: Patterns of the names of modules that the input passes through in order, such as
            `("embed", "blocks.*", "norm", "head")`. Each takes the output of the one before.
            Together they have all parameters.
        split: Names of the modules of the chain at which a new stage begins; None balances the
            number of parameters.
        schedule: `"1f1b"` and `"gpipe"` have one stage on each rank, `"interleaved"`,
            `"interleaved-zero-bubble"` and `"looped-bfs"` any number, `"zbv"` and `"dualpipev"`
            two. They are PyTorch's schedules.
        stages_per_rank: Number of stages of each rank.
        forward: `"chain"` calls the modules of the chain one after the other. `"model"` runs the
            forward of the model in each stage, without the modules of other stages: for decoders,
            which pass masks and positions to each block. The modules before the first pattern with
            `*` and the first block are then in one stage.

    A module that is called several times, or takes other inputs than the output of the module
    before it, cannot be in a chain that stages call. In evaluation, tensors with as many rows as
    the first input are split with the batch.
    """

    chain: tuple[str, ...] = attrs.field(converter=patterns)
    split: tuple[str, ...] | None = attrs.field(
        default=None, converter=attrs.converters.optional(patterns)
    )
    schedule: str = attrs.field(default="1f1b", validator=choice(*SCHEDULES))
    stages_per_rank: int = attrs.field(default=1, validator=positive_number())
    forward: str = attrs.field(default="chain", validator=choice("chain", "model"))

    def __attrs_post_init__(self) -> None:
        if self.schedule in ONE_STAGE_SCHEDULES and self.stages_per_rank > 1:
            raise ConfigError(
                f"`stages_per_rank` must be 1 with the schedule {short_repr(self.schedule)}",
                got=f"stages_per_rank={self.stages_per_rank}",
                fix='write `schedule="interleaved"`',
            )
        # A V: the ranks in order, and back again.
        if self.schedule in V_SCHEDULES and self.stages_per_rank != 2:
            raise ConfigError(
                f"`stages_per_rank` must be 2 with the schedule {short_repr(self.schedule)}",
                got=f"stages_per_rank={self.stages_per_rank}",
                fix="write `stages_per_rank=2`",
            )


@attrs.frozen(kw_only=True)
class Plan:
    """How `wrap` runs one model. Options of a strategy that the mesh does not use have no effect.

    Args:
        ddp: Options of DDP.
        fsdp: Options of FSDP2.
        deepspeed: Options of DeepSpeed.
        units: The modules that are sharded, checkpointed and compiled as one unit: names of classes
            (`"Block"`), patterns of module names (`"blocks.*"`), or a number: modules with at least
            that many parameters. None takes the model's `_no_split_modules`, else the members of
            its `ModuleList`s, without those that share a parameter with another part. The root is
            the unit of all other parameters.
        tensor: For a mesh with `tp`: how to shard the modules that match each name pattern.
            `"colwise"` and `"rowwise"` linear layers or embeddings come in pairs.
            `"colwise_gather"` gathers its output on every rank. `"colwise_loss"` leaves the logits
            sharded, for `faccel.parallel.loss_parallel`. `"rowwise_embedding"` shards the
            vocabulary. `"rowwise_split"` takes a replicated input. `"heads"` is a norm over each
            rank's attention heads. `"sequence"` is a norm over a chunk of the sequence;
            `"sequence_colwise"`, `"sequence_rowwise"` and `"sequence_embedding"` have such chunks
            as input or output. Other modules are replicated.
        pipeline: For a mesh with `pp`: how to split the model into stages.
        activation_checkpoint: `"full"`, `n` for every n-th unit, or an `ActivationCheckpointing`.
        compile: `"whole"` compiles the model, `"units"` each unit, a `Compile` has the options of
            `torch.compile`; None does not compile. The first forward raises if nothing was
            compiled.
        offload: Whether parameters, gradients and optimizer states are kept in the memory of the
            host.
        fp8: How linear layers multiply with `mixed_precision="fp8"`; None is `Fp8()`.
        layerwise_casting: The dtype in which frozen layers are stored, such as `"float8_e4m3fn"`,
            or a `LayerwiseCasting`. For one process and replicas.

    Examples:
        >>> Plan(ddp=DdpConfig(find_unused_parameters=True, comm_hook="fp16")).ddp.comm_hook
        'fp16'
        >>> Plan(units="Block", tensor={"blocks.*.up": "colwise", "blocks.*.down": "rowwise"}).units
        ('Block',)
    """

    # Instances as defaults: they are frozen, so all plans can have the same ones.
    ddp: DdpConfig = DdpConfig()
    fsdp: FsdpConfig = FsdpConfig()
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    units: tuple[str, ...] | int | None = attrs.field(default=None, converter=_units)
    # The converters copy into tuples and read-only mappings: a plan does not alias its arguments.
    tensor: Mapping[str, str] = attrs.field(factory=dict, converter=_tensor_styles)
    pipeline: PipelineConfig | None = None
    activation_checkpoint: ActivationCheckpointing | None = attrs.field(
        default=None, converter=to_activation_checkpoint
    )
    compile: Compile | None = attrs.field(default=None, converter=to_compile)
    offload: bool = bool_field(default=False)
    fp8: Fp8 | None = None
    layerwise_casting: LayerwiseCasting | None = attrs.field(
        default=None, converter=to_layerwise_casting
    )

    def __reduce__(self) -> tuple[Callable[..., Plan], tuple[object, ...]]:
        fields = attrs.asdict(self, recurse=False)
        fields["tensor"] = dict(self.tensor)
        return construct, (Plan, fields)

    # Whether the plan fits the mesh and the model is checked by `wrap`, which has both.
    def __attrs_post_init__(self) -> None:
        self._check_class("ddp", DdpConfig)
        self._check_class("fsdp", FsdpConfig)
        self._check_class("deepspeed", DeepSpeedConfig)
        if self.pipeline is not None:
            self._check_class("pipeline", PipelineConfig)
            self._check_split_backward(self.pipeline.schedule)
        if self.fp8 is not None:
            self._check_class("fp8", Fp8)
        if self.activation_checkpoint is not None:
            self._check_memory_budget(self.activation_checkpoint.memory_budget)

    def _check_class(self, name: str, cls: type) -> None:
        fix = f"write `{name}=faccel.parallel.{cls.__name__}(...)`"
        instance_of(name, getattr(self, name), cls, fix=fix)

    # A schedule that splits the backward needs the graph and the gathered parameters of a stage
    # from forward until the gradients of the parameters are computed.
    def _check_split_backward(self, schedule: str) -> None:
        if schedule not in SPLIT_BACKWARD_SCHEDULES:
            return
        # The backward of a compiled graph is one function, which PyTorch cannot split.
        if self.compile is not None:
            raise ConfigError(
                f"`compile` is unsupported with the schedule {short_repr(schedule)}, which splits "
                "the backward",
                got=f"compile={short_repr(self.compile)}",
                fix='write `schedule="interleaved"`, or leave `compile` out',
            )
        if self.fsdp.reshard_after_forward not in (None, False):
            raise ConfigError(
                "`reshard_after_forward` must be False with the schedule "
                f"{short_repr(schedule)}, which splits the backward",
                got=f"reshard_after_forward={self.fsdp.reshard_after_forward}",
                fix='write `reshard_after_forward=False`, or `schedule="interleaved"`',
            )

    # The validator of the field has checked that it is positive; 1 is PyTorch's default.
    def _check_memory_budget(self, budget: float | None) -> None:
        if budget is None:
            return
        if budget > 1:
            raise ConfigError(
                "`memory_budget` must be at most 1",
                got=f"memory_budget={budget}",
                fix="write `memory_budget=0.5` to keep half of the activations",
            )
        if self.compile is None or self.compile.backend != "inductor":
            raise ConfigError(
                "`memory_budget` needs `compile`, because the compiler chooses what to keep",
                got=f"compile={short_repr(self.compile)}",
                fix='write `compile="units"`, too',
            )
