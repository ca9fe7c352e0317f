"""Options of `accelerate launch` and `torchrun`, translated to those of `faccel launch`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs
import click

from faccel.cli.flags import UsageError
from faccel.config import flag_of, text_of
from faccel.config_file import NPROC
from faccel.errors import FaccelError, LaunchError, short_repr

if TYPE_CHECKING:
    from faccel.launching.import_accelerate import ImportedConfig

_STRATEGY = "distributed_type"
# As torchrun writes them: a number for all ranks, or one for each of some ranks.
_STREAMS = re.compile(r"[0-3]|\d+:[0-3](,\d+:[0-3])*")
# Options of Accelerate 1.15 and torchrun without a value.
_SWITCHES: Mapping[str, tuple[str, str]] = {
    "use_fsdp": (_STRATEGY, "FSDP"),
    "use_deepspeed": (_STRATEGY, "DEEPSPEED"),
    "use_megatron_lm": (_STRATEGY, "MEGATRON_LM"),
    "tpu": (_STRATEGY, "TPU"),
    "use_cpu": ("use_cpu", "true"),
    "enable_cpu_affinity": ("enable_cpu_affinity", "true"),
    "dynamo_use_fullgraph": ("dynamo_use_fullgraph", "true"),
    "dynamo_use_dynamic": ("dynamo_use_dynamic", "true"),
    "dynamo_use_regional_compilation": ("dynamo_use_regional_compilation", "true"),
    "fp8_use_autocast_during_eval": ("fp8_use_autocast_during_eval", "true"),
    "downcast_bf16": ("downcast_bf16", "true"),
    # What faccel does without an option: all devices, one node, the sections that are there.
    "multi_gpu": ("", ""),
    "use_parallelism_config": ("", ""),
    "same_network": ("", ""),
    "standalone": ("", ""),
    "quiet": ("", ""),
    "q": ("", ""),
    "tpu_cluster": ("tpu_cluster", "true"),
    "no_tpu_cluster": ("", ""),
    "tpu_use_sudo": ("tpu_use_sudo", "true"),
    # Of torchrun and of `torch.distributed.launch`: ranks read their environment anyway.
    "use_env": ("", ""),
    "run_path": ("run_path", "true"),
    "virtual_local_rank": ("virtual_local_rank", "true"),
}
# Options with a value, by the key of a file of Accelerate that has the meaning.
_VALUES: Mapping[str, str] = {
    "num_processes": "num_processes",
    "num_machines": "num_machines",
    "machine_rank": "machine_rank",
    "main_process_ip": "main_process_ip",
    "main_process_port": "main_process_port",
    "main_training_function": "main_training_function",
    "rdzv_backend": "rdzv_backend",
    "zero_stage": "deepspeed_config.zero_stage",
    "gradient_accumulation_steps": "deepspeed_config.gradient_accumulation_steps",
    "gradient_clipping": "deepspeed_config.gradient_clipping",
    "mpirun_hostfile": "mpirun_config.mpirun_hostfile",
}
# Families of options, by the section of a file that they are keys of.
_SECTIONS: Mapping[str, str] = {
    "fsdp_": "fsdp_config",
    "deepspeed_": "deepspeed_config",
    "offload_": "deepspeed_config",
    "zero3_": "deepspeed_config",
    "dynamo_": "dynamo_config",
    "parallelism_config_": "parallelism_config",
    "megatron_lm_": "megatron_lm_config",
}
# The switches of the sections that apply to one strategy.
_SWITCH_OF: Mapping[str, str] = {
    "fsdp_config": "use_fsdp",
    "deepspeed_config": "use_deepspeed",
    "megatron_lm_config": "use_megatron_lm",
}
# Options of `faccel launch` that another launcher names otherwise.
_RENAMED: Mapping[str, str] = {
    "nproc_per_node": "--nproc",
    # With `--nnodes` and `--node-rank`, which have the same names in torchrun. Accelerate's
    # `--main_process_ip` counts only with `--num_machines`.
    "master_addr": "--main-address",
    "master_port": "--main-port",
    "num_cpu_threads_per_process": "--threads-per-process",
}
_NOT_ONE = "leave it out: faccel launches with torchrun's elastic agent"
# What to write instead of the other options. A name with `_` at the end is a family.
EQUALS: Mapping[str, str] = {
    "role": _NOT_ONE,
    "start_method": "leave it out: each rank is a new process",
    "event_log_handler": _NOT_ONE,
    "logs_specs": "use `--log-dir DIR`",
    "local_addr": "set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to a network interface",
    "local_ranks_filter": "use `--log-dir DIR --tee`",
    "duplicate_": "use `--log-dir DIR --tee`",
    "redirects": "use `--log-dir DIR`: both streams of each rank are written there",
    "r": "use `--log-dir DIR`: both streams of each rank are written there",
    "run_path": "leave it out: a script runs as with `python SCRIPT`",
    "shutdown_timeout": "leave it out: ranks may take any time to save; a second signal ends them",
    "signals_to_handle": "leave it out: SIGINT, SIGTERM, SIGHUP and SIGUSR1 reach the ranks",
    "t": "use `--log-dir DIR --tee`",
    "virtual_local_rank": "use `ctx.local_rank` and `ctx.device` in the script",
    "rdzv_conf": "use `--join-timeout SECONDS`",
    "monitor_interval": _NOT_ONE,
    "vm": "print the commands of a TPU pod with `faccel launch --print tpu-pod`",
    "env": "set the variables in the shell",
    "aws_": "start `faccel launch` inside of the job on Amazon SageMaker",
    "fsdp_": "use `--plan`, as in `--plan units=Block`, with the fields of `faccel.Plan`",
    "deepspeed_": "use `--plan deepspeed.settings=ds.json`, with the keys of DeepSpeed in the file",
    "offload_": "use `--plan deepspeed.settings=ds.json`, with the keys of DeepSpeed in the file",
    "zero_stage": "use `--strategy deepspeed --zero 2`",
    "zero3_": "leave it out, or use `--strategy deepspeed --zero 3`",
    "gradient_": "use `--grad-accum N`, and `faccel.optimizer_step(..., clip_norm=1.0)`",
    "dynamo_": "use `--plan compile=whole`, or call `torch.compile` in the script",
    "parallelism_config_": "use `--mesh dp_shard=2,tp=2`",
    "megatron_lm_": "use `--mesh dp_shard=2,tp=2,pp=2` and `faccel.Plan` in the script",
    "distributed_type": "use `--mesh`, as in `--mesh dp_shard=2,tp=2`",
    "fp8_": "use `--mixed-precision fp8 --plan fp8.recipe=rowwise`",
    "fp8_format": "use `--mixed-precision fp8 --plan fp8.backend=te,fp8.te.format=hybrid`",
    "fp8_interval": "leave it out: Transformer Engine computes scales in each forward",
    "fp8_override_linear_precision": "use `--mixed-precision fp8 "
    "--plan fp8.recipe=rowwise_with_gw_hp`: torchao has weight gradients in bf16",
    "tpu_": "print the commands of a TPU pod with `faccel launch --print tpu-pod`",
    "mpirun_": "print the command of mpirun with `faccel launch --print mpirun`",
    "rdzv_backend": "use `--rdzv-endpoint HOST:PORT`",
    "mixed_precision": "use `--mixed-precision bf16`",
}
_NOT_CONVERTED = "remove it"


class LaunchCommand(click.Command):
    """A command that takes the options of `accelerate launch`, too."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the words after the command.

        Raises:
            UsageError: An option of another launcher has no equivalent, or contradicts another.
        """
        try:
            own = _OwnOptions.of(self.get_params(ctx))
            translated = translate(args, own)
        except FaccelError as error:
            raise UsageError(error) from None
        return super().parse_args(ctx, translated)


@attrs.frozen
class _OwnOptions:
    """The options of a command, by name, and those that take no value."""

    names: frozenset[str]
    switches: frozenset[str]

    @classmethod
    def of(cls, params: Sequence[click.Parameter]) -> _OwnOptions:
        names: set[str] = set()
        switches: set[str] = set()
        for param in params:
            if isinstance(param, click.Option):
                options = (*param.opts, *param.secondary_opts)
                names.update(options)
                if param.is_flag:
                    switches.update(options)
        return cls(frozenset(names), frozenset((*switches, "--help")))


def translate(args: Sequence[str], own: _OwnOptions) -> list[str]:
    """Return the words of a command line with each option of another launcher as ours.

    Only options before the script are translated. A dash in a name may be an underscore.

    Effects: ambient. Reads the file of `--config_file`.

    Raises:
        LaunchError: An option has no equivalent, or contradicts another one.
        ConfigError: The file is invalid.
    """
    kept: list[str] = []
    given: dict[str, str] = {}
    foreign: dict[str, str] = {}
    words = list(args)
    # Up to the script: what follows belongs to it, even if it has a name of the launcher.
    while words and words[0].startswith("-") and words[0] != "--":
        option, mark, value = _next_option(words)
        name = option.lstrip("-").replace("-", "_")
        own_name = _RENAMED.get(name, option.replace("_", "-"))
        is_own = own_name in own.names
        if name not in _SWITCHES and own_name not in own.switches and not mark:
            # The next word is the value, unless it is the first of a typing mistake.
            if not is_own and not _takes_value(name):
                return [*args]  # an unknown option, for which click suggests one
            mark, value = "=", words.pop(0) if words else ""
        if is_own and name not in _SWITCHES:
            given[own_name] = value
            kept.append(own_name + mark + value)
        else:
            foreign[name] = value
    if not foreign:
        return [*kept, *words]
    return [*_converted(foreign, given), *kept, *words]


def _next_option(words: list[str]) -> tuple[str, str, str]:
    """Remove the first option of a command line; return its name, `=` and value."""
    option, mark, value = words.pop(0).partition("=")
    # torchrun's `--tee` has a value, the streams; that of faccel has none.
    if option in ("-t", "--tee") and _STREAMS.fullmatch(value or "".join(words[:1])):
        streams = value or words.pop(0)
        if streams == "3":  # stdout and stderr
            return "--tee", "", ""
        return "-t", "=", streams
    return option, mark, value


def _takes_value(name: str) -> bool:
    return name in _VALUES or name == "config_file" or _matches(name, (*_SECTIONS, *EQUALS)) != ""


def _matches(name: str, names: Iterable[str]) -> str:
    """Return the longest of `names` that is `name`, or its family; empty without one."""
    families = [item for item in names if item.endswith("_") and name.startswith(item)]
    if name in names:
        return name
    return max(families, key=len, default="")


def _converted(foreign: Mapping[str, str], given: Mapping[str, str]) -> list[str]:
    """Return our options for those of Accelerate, by the conversion of its files.

    Args:
        foreign: The options of Accelerate, and their values.
        given: Our options on the same command line, and their values.
    """
    from faccel.config_file import read_accelerate
    from faccel.launching.import_accelerate import from_accelerate

    keys: dict[str, Any] = {_STRATEGY: "NO"}
    if "config_file" in foreign:
        keys |= read_accelerate(foreign["config_file"])
    strategies = [f"`--{name}`" for name in foreign if _SWITCHES.get(name, ("",))[0] == _STRATEGY]
    if len(strategies) > 1:
        raise LaunchError(
            "a launch has one strategy", got=" and ".join(strategies), fix="remove one of them"
        )
    for name, value in foreign.items():
        if name != "config_file":
            _set_key(keys, name, value)
    if "--mixed-precision" in given:  # which decides whether a section for fp8 applies
        keys["mixed_precision"] = given["--mixed-precision"]
    converted = from_accelerate(keys)
    _check_converted(converted, keys, foreign)
    # Of the nodes first, then the fields of the configuration.
    options = dict(zip(converted.options[::2], converted.options[1::2], strict=True))
    for name, value in converted.values.items():
        option, text = _own_option(name, value)
        options[option] = text
    return _without_given(options, given, foreign)


def _check_converted(
    converted: ImportedConfig, keys: Mapping[str, Any], foreign: Mapping[str, str]
) -> None:
    """Raise if an option or a key has no equal on our command line."""
    for key, value in converted.without_equivalent.items():
        _check_strategy(key, str(keys[_STRATEGY]), foreign)
        raise _no_equivalent(key, value, foreign)
    for key, text in converted.in_script.items():
        section, _, name = key.partition(".")
        raise _no_equivalent(key, keys[section][name], foreign, f"write {text} in the script")


def _check_strategy(key: str, strategy: str, foreign: Mapping[str, str]) -> None:
    """Raise if an option has no effect, because its strategy is not chosen."""
    section, _, name = key.partition(".")
    switch = _SWITCH_OF.get(section, "")
    if name in foreign and switch and strategy != _SWITCHES[switch][1]:
        raise LaunchError(
            f"`--{name}` has no effect without `--{switch}`",
            got=f"--{name} {short_repr(foreign[name])}",
            fix=f"add `--{switch}`, or remove `--{name}`",
        )


def _without_given(
    options: Mapping[str, str], given: Mapping[str, str], foreign: Mapping[str, str]
) -> list[str]:
    """Return the words of the options that are not given under our names, too."""
    words: list[str] = []
    for option, value in options.items():
        if option not in given:
            words += filter(None, (option, value))
        # Options are stronger than a file, but two of them must agree.
        elif given[option] != value and "config_file" not in foreign:
            raise LaunchError(
                f"`{option}` is given in two ways",
                got=f"`{option} {given[option]}`, and `{option} {value}` from "
                f"{', '.join(f'`--{name}`' for name in foreign)}",
                fix="remove one of them",
            )
    return words


def _set_key(keys: dict[str, Any], name: str, value: Any) -> None:
    """Set the key of a file of Accelerate that an option stands for."""
    if name in _SWITCHES:  # that it is there is its value
        name, value = _SWITCHES[name]
    if value.isdecimal():  # as a file has it
        value = int(value)
    family = _matches(name, _SECTIONS)
    if name in _VALUES:
        name = _VALUES[name]
    elif family:
        name = f"{_SECTIONS[family]}.{name}"
    if name.startswith("fp8_"):  # whose keys in a file have no prefix
        name = f"fp8_config.{name.removeprefix('fp8_')}"
    section, mark, key = name.partition(".")
    if mark:
        keys[section] = {**(keys.get(section) or {}), key: value}
    elif name:
        keys[name] = value


def _own_option(name: str, value: Any) -> tuple[str, str]:
    """Return our option for a field of the configuration, and its value; empty for a switch."""
    if name == NPROC:
        return "--nproc", str(value)
    if value is True:
        return flag_of(name), ""
    # The records of a configuration, as text.
    if name == "mesh":
        return "--mesh", ",".join(f"{axis}={size}" for axis, size in value.items())
    if name == "plan":
        from faccel.plan_values import to_plan

        value = to_plan(value)
    return flag_of(name), text_of(value)


def _no_equivalent(
    key: str, value: object, foreign: Mapping[str, str], fix: str = ""
) -> LaunchError:
    name = key.rpartition(".")[2]
    if key.startswith("fp8_config."):
        name = f"fp8_{name}"
    fix = fix or EQUALS.get(_matches(name, EQUALS), _NOT_CONVERTED)
    if name in foreign:
        return LaunchError(
            f"`--{name}` is not an option of `faccel launch`",
            got=f"--{name} {short_repr(value)}",
            fix=fix,
        )
    file = foreign.get("config_file", "")
    if file:
        return LaunchError(
            f"`{key}` has no equivalent in faccel",
            got=f"{key}: {short_repr(value)}, from `{file}`",
            fix=f"convert the file with `faccel config import {file} -o faccel.yaml`; {fix}",
        )
    return LaunchError(f"`{name}` has no equivalent", got=short_repr(value), fix=fix)
