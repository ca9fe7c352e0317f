"""How a model is run on its mesh: frozen records of plain values, given to `wrap`."""

from __future__ import annotations

from typing import Any

import attrs

from faccel.errors import ConfigError, nearest

HOOKS = ("bf16", "bf16_powersgd", "fp16", "fp16_powersgd", "powersgd")
"""How gradients may be compressed on their way between the ranks."""


def _hook(_: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    if value is not None and value not in HOOKS:
        raise ConfigError(f"`{attribute.name}` is not a compression of gradients", saw=repr(value),
                          fix=nearest(str(value), HOOKS))  # fmt: skip


def _positive(_: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    if value is not None and not (isinstance(value, (int, float)) and value > 0):
        raise ConfigError(f"`{attribute.name}` must be positive", saw=repr(value), fix=f"write `{attribute.name}=1`")


def _flag(_: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    if not isinstance(value, bool):
        fix = f"write `{attribute.name}=True`"
        raise ConfigError(f"`{attribute.name}` must be True or False", saw=repr(value), fix=fix)


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
                saw=f"start_step={self.start_step}",
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
    """

    find_unused_parameters: bool = _option(False)
    static_graph: bool = _option(False)
    forward_sync_buffers: bool = _option(True)
    bucket_cap_mb: float | None = attrs.field(default=None, validator=_positive)
    gradient_as_bucket_view: bool = _option(True)
    skip_all_reduce_unused_params: bool = _option(False)
    comm_hook: str | None = attrs.field(default=None, validator=_hook)
    powersgd: PowerSgdConfig = PowerSgdConfig()


@attrs.frozen(kw_only=True)
class Plan:
    """How `wrap` runs one model; what concerns another strategy than the mesh's is left alone.

    Args:
        ddp: Options of DDP.

    Examples:
        >>> Plan(ddp=DdpConfig(find_unused_parameters=True, comm_hook="fp16")).ddp.comm_hook
        'fp16'
    """

    ddp: DdpConfig = DdpConfig()

    def __attrs_post_init__(self) -> None:
        if not isinstance(self.ddp, DdpConfig):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigError("`ddp` takes a `DdpConfig`", saw=repr(self.ddp), fix="write `ddp=faccel.DdpConfig(...)`")
