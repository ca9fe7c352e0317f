"""Converts Accelerate's sections for FSDP, DeepSpeed and compilation to arguments of `Plan`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from faccel.checks import MAX_COUNT
from faccel.errors import ConfigError, short_repr

Arguments = dict[str, Any]
"""Arguments of `Plan` by name; `fsdp.prefetch` is the argument `prefetch` of `fsdp`."""

# Returns the arguments for a value, none if faccel does the same without one, or None if it has no
# equivalent.
_Convert = Callable[[Any], Arguments | None]


def is_true(value: object) -> bool:
    """Return whether a value is true; older versions wrote `'true'`.

    Effects: pure.
    """
    return str(value).lower() in ("true", "1", "yes")


def whole_number(name: str, value: Any, minimum: int = 0, maximum: int = MAX_COUNT) -> int:
    """Return a value of a file as an int from `minimum` to `maximum`.

    Effects: pure.

    Raises:
        ConfigError: It is none.
    """
    number = None
    with suppress(TypeError, ValueError, OverflowError):  # OverflowError: infinity
        number = int(value)
    # `int` cuts 2.5 off.
    is_cut = isinstance(value, float) and not value.is_integer()
    if number is None or not minimum <= number <= maximum or is_cut:
        raise ConfigError(
            f"`{name}` of the file must be a whole number from {minimum} to {maximum}",
            got=short_repr(value),
            fix=f"write `{name}: 1`",
        )
    return number


def _needs_nothing(value: object) -> Arguments:
    return {}


def _if_true(**arguments: object) -> _Convert:
    """Return a conversion of a switch, which is off by default in faccel."""

    def convert(value: object) -> Arguments | None:
        if is_true(value):
            return {name.replace("__", "."): item for name, item in arguments.items()}
        return {}

    return convert


def _only(*values: str) -> _Convert:
    """Return a conversion of a setting that faccel has with one of `values` only."""

    def convert(value: object) -> Arguments | None:
        if str(value).lower() in values:
            return {}
        return None

    return convert


def _by_word(table: Mapping[str, Arguments]) -> _Convert:
    return lambda value: table.get(str(value).lower())


def _layers(value: object) -> Arguments:
    names = value if isinstance(value, list) else str(value).split(",")
    return {"units": [str(name).strip() for name in names]}


def _min_num_params(value: Any) -> Arguments | None:
    try:
        num_params = int(value)
    except (TypeError, ValueError, OverflowError):  # reported as a key without an equivalent
        return None
    if num_params > 0:
        return {"units": num_params}
    return {}


def _number(name: str) -> Callable[[Any], Arguments | None]:
    """Return a conversion of a number that is a key of DeepSpeed's settings."""

    def convert(value: Any) -> Arguments | None:
        if str(value).lower() == "none":
            return {}
        try:
            return {"deepspeed.settings": {name: float(value)}}
        except (TypeError, ValueError, OverflowError):
            return None

    return convert


def _compiler(value: object) -> Arguments:
    compiler = str(value).lower()
    if compiler == "inductor":
        return {"compile.what": "whole"}
    return {"compile.what": "whole", "compile.backend": compiler}


def _compile_mode(value: object) -> Arguments:
    if str(value) == "default":
        return {}
    return {"compile.mode": str(value)}


# FSDP1's words and numbers, and FSDP2's switch. The mesh, which `HYBRID_SHARD` needs too, follows
# in `import_accelerate`.
_KEEP_UNSHARDED: Arguments = {"fsdp.reshard_after_forward": False}
_RESHARD: Mapping[str, Arguments] = {
    "full_shard": {},
    "1": {},
    "true": {},
    "shard_grad_op": _KEEP_UNSHARDED,
    "2": _KEEP_UNSHARDED,
    "false": _KEEP_UNSHARDED,
    "no_shard": {},
    "3": {},
    "hybrid_shard": {},
    "4": {},
    "hybrid_shard_zero2": _KEEP_UNSHARDED,
    "_hybrid_shard_zero2": _KEEP_UNSHARDED,
    "5": _KEEP_UNSHARDED,
}
_FSDP: Mapping[str, _Convert] = {
    "fsdp_version": _needs_nothing,  # FSDP2 has the same mathematics
    "fsdp_sharding_strategy": _by_word(_RESHARD),
    "fsdp_reshard_after_forward": _by_word(_RESHARD),
    "fsdp_offload_params": _if_true(offload=True),
    "fsdp_activation_checkpointing": _if_true(activation_checkpoint="full"),
    "fsdp_auto_wrap_policy": _only("transformer_based_wrap", "size_based_wrap"),
    "fsdp_transformer_layer_cls_to_wrap": _layers,
    "fsdp_min_num_params": _min_num_params,
    "fsdp_forward_prefetch": _if_true(fsdp__prefetch=1),
    "fsdp_backward_prefetch": _only("backward_pre", "1"),  # FSDP2 always does
    "fsdp_limit_all_gathers": _only("true"),  # FSDP2 always does
    "fsdp_use_orig_params": _needs_nothing,  # parameters keep their names
    "fsdp_sync_module_states": _needs_nothing,  # `wrap` sends the weights of rank 0
    "fsdp_state_dict_type": _needs_nothing,  # checkpoints load in every layout
    # A model on the meta device is made shard by shard, as with `zero3_init_flag`
    "fsdp_cpu_ram_efficient_loading": _needs_nothing,
}
_DEEPSPEED: Mapping[str, _Convert] = {
    "offload_optimizer_device": _by_word(
        {"none": {}, "cpu": {"deepspeed.offload_optimizer": "cpu"}}
    ),
    "offload_param_device": _by_word({"none": {}, "cpu": {"deepspeed.offload_params": "cpu"}}),
    "gradient_clipping": _number("gradient_clipping"),
    "deepspeed_config_file": lambda value: {"deepspeed.settings": str(value)},
    "zero3_init_flag": _needs_nothing,  # a model on the meta device is made shard by shard
    "zero3_save_16bit_model": _needs_nothing,  # `export_model` always can
    "deepspeed_multinode_launcher": _only("standard"),
}
_DYNAMO: Mapping[str, _Convert] = {
    "dynamo_backend": _compiler,
    "dynamo_use_regional_compilation": _if_true(compile__what="units"),
    "dynamo_mode": _compile_mode,
    "dynamo_use_dynamic": _if_true(compile__dynamic=True),
    "dynamo_use_fullgraph": _if_true(compile__fullgraph=True),
}
_TABLES: Mapping[str, Mapping[str, _Convert]] = {
    "fsdp_config": _FSDP,
    "deepspeed_config": _DEEPSPEED,
    "dynamo_config": _DYNAMO,
}


def convert_section(name: str, section: Arguments) -> Arguments:
    """Return the arguments of `Plan` for a section, and remove the keys that have an equivalent.

    Effects: updates section.

    Examples:
        >>> section = {"fsdp_offload_params": True, "fsdp_ignored_modules": "head"}
        >>> convert_section("fsdp_config", section), section
        ({'offload': True}, {'fsdp_ignored_modules': 'head'})
    """
    arguments: Arguments = {}
    # In the order of the table: regional compilation replaces that of the whole model.
    for key, convert in _TABLES[name].items():
        if key not in section:
            continue
        converted = convert(section[key])
        if converted is not None:
            arguments |= converted
            del section[key]
    return arguments
