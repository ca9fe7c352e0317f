"""`faccel launch` and `faccel test`."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import attrs
import click

from faccel.checks import parse_count
from faccel.cli.flags import UsageError, config_flags, parse_flags
from faccel.cli.foreign_options import LaunchCommand
from faccel.cli.output import json_option
from faccel.config_file import NPROC, NPROC_WORDS
from faccel.errors import FaccelError, LaunchError, short_repr, short_text, with_source

if TYPE_CHECKING:
    from faccel.config import Config
    from faccel.config_file import ConfigFile
    from faccel.launching.spec import LaunchSpec

CommandT = TypeVar("CommandT", bound=Callable[..., None])
# Options of the command line that are fields of `LaunchSpec` under the same name.
_SPEC_FIELDS = (
    "nnodes",
    "node_rank",
    "main_address",
    "main_port",
    "rdzv_endpoint",
    "rdzv_id",
    "join_timeout_s",
    "hang_report_s",
    "max_restarts",
    "log_dir",
    "tee",
    "numa_binding",
    "config",
)

# A number, or an identifier as `nvidia-smi -L` prints it.
_GPU_ID = r"(\d+|(GPU|MIG)-[\w/-]+)"


def launch_options(command: CommandT) -> CommandT:
    """Add the options of a launch, and a flag for each field of `Config`, to a command.

    Effects: pure.
    """
    command = config_flags(command)
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


# In the order of the help text: what, where, how long, what is logged.
_OPTIONS = (
    click.option(
        "--nproc",
        metavar="N|auto|cpu|gpu",
        help="Processes per node. auto: one per GPU, or one without GPUs. Default: `nproc` of the "
        "configuration file, else auto.",
    ),
    click.option("--cpu", is_flag=True, help="Run on the CPU: short for `--device cpu`."),
    click.option(
        "--gpu-ids",
        metavar="I,J,...",
        help="The GPUs of this node to use: sets CUDA_VISIBLE_DEVICES. Default: all.",
    ),
    click.option(
        "--threads-per-process",
        type=click.IntRange(1),
        metavar="N",
        help="CPU threads of each process: sets OMP_NUM_THREADS. Default: the cores, divided.",
    ),
    click.option(
        "--nnodes", default="1", show_default=True, metavar="N|MIN:MAX", help="Number of nodes."
    ),
    click.option("--node-rank", type=int, help="Rank of this node, starting at 0."),
    click.option("--main-address", metavar="HOST", help="Host of node 0."),
    click.option(
        "--main-port",
        type=click.IntRange(1, 65535),
        help="Port on node 0. Default: a free port for one node, 29500 for several.",
    ),
    click.option(
        "--rdzv-endpoint",
        metavar="HOST:PORT",
        help="Elastic rendezvous, instead of --main-address.",
    ),
    click.option(
        "--rdzv-id", default="faccel", show_default=True, help="Name of the run at the rendezvous."
    ),
    click.option(
        "--join-timeout",
        "join_timeout_s",
        type=click.FloatRange(1),
        default=600,
        show_default=True,
        metavar="SECONDS",
        help="Seconds that nodes wait for each other.",
    ),
    click.option(
        "--hang-report",
        "hang_report_s",
        type=click.FloatRange(0),
        default=300,
        show_default=True,
        metavar="SECONDS",
        help="With --run-dir: seconds without a collective or a step after which the reason is "
        "printed once, as by `faccel why`. 0: never.",
    ),
    click.option(
        "--max-restarts",
        type=click.IntRange(0),
        default=0,
        show_default=True,
        help="Restarts of all processes after a failure.",
    ),
    click.option("--log-dir", metavar="DIR", help="Write the output of each process to DIR."),
    click.option("--tee", is_flag=True, help="With --log-dir: also print the output."),
    click.option(
        "--numa-binding",
        metavar="node|socket|exclusive|core-complex",
        help="Bind each process to the CPU cores near its GPU, as torchrun does.",
    ),
    click.option("--config", metavar="FILE[#SECTION]", help="Configuration file or section."),
)


# Options after SCRIPT belong to the script, even if faccel has one of the same name.
@click.command(
    cls=LaunchCommand,
    context_settings={"ignore_unknown_options": False, "allow_interspersed_args": False},
)
@launch_options
@click.option("-m", "--module", is_flag=True, help="SCRIPT is a Python module.")
@click.option("--no-python", is_flag=True, help="SCRIPT is an executable.")
@click.option(
    "--print",
    "rendering",
    # The rows of `faccel.launching.render.RENDERINGS`, which is imported only for this option
    type=click.Choice(
        ("k8s", "k8s-pytorchjob", "mpirun", "ray", "sky", "slurm", "torchrun", "tpu-pod")
    ),
    help="Print the launch for another launcher, and start nothing.",
)
@click.argument("script")
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
def launch(script: str, args: tuple[str, ...], **options: Any) -> None:
    """Run SCRIPT with ARGS in one or more processes.

    Options come before SCRIPT; everything after it is passed to the script. Configuration flags
    override the environment and the configuration file. A flag that contradicts an argument of
    `faccel.init` is an error.
    """
    _launch((script, *args), options)


@click.command(cls=LaunchCommand)
@launch_options
@json_option
def test(*, as_json: bool, **options: Any) -> None:
    """Check collectives, data order, training, checkpoints and bandwidth on these processes."""
    command = ["faccel.testing.selftest"]
    if as_json:
        command.append("--json")
    options |= {"module": True, "no_python": False, "rendering": None}
    _launch(tuple(command), options)


def _launch(command: tuple[str, ...], options: Mapping[str, Any]) -> None:
    from faccel.launching.run import run
    from faccel.launching.tpu import is_tpu, prepare_tpus

    _set_environment(options)
    try:
        # Errors up to here are about the command line and the configuration file: exit code 2.
        spec, config = _spec(command, options)
        if options["rendering"]:
            from faccel.launching.render import RENDERINGS

            print(RENDERINGS[options["rendering"]](spec), end="")
            return
        _check_mesh(spec, config)
        if not spec.is_single_process and is_tpu(config):
            prepare_tpus(spec)
    except FaccelError as error:
        raise UsageError(error) from None
    try:
        # A single process replaces this one, so that `run` does not return.
        code = run(spec, os.environ)
    except LaunchError as error:
        raise UsageError(error) from None
    except FaccelError as error:
        raise click.ClickException(str(error)) from None
    sys.exit(code)


def _set_environment(options: Mapping[str, Any]) -> None:
    """Set the variables that options stand for, before PyTorch reads them, for the ranks too."""
    gpu_ids, num_threads = options["gpu_ids"], options["threads_per_process"]
    if options["rendering"] and (gpu_ids or num_threads):
        raise UsageError(
            LaunchError(
                "`--gpu-ids` and `--threads-per-process` set variables of this node only",
                got=f"`--print {options['rendering']}`",
                fix="set CUDA_VISIBLE_DEVICES and OMP_NUM_THREADS in the printed script",
            )
        )
    if gpu_ids and not re.fullmatch(rf"all|{_GPU_ID}(,{_GPU_ID})*", gpu_ids):
        raise UsageError(
            LaunchError(
                "`--gpu-ids` must be numbers of GPUs, separated by commas",
                got=short_repr(gpu_ids),
                fix="write `--gpu-ids 0,1`",
            )
        )
    if gpu_ids and gpu_ids != "all":
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu_ids
    if num_threads:
        os.environ["OMP_NUM_THREADS"] = str(num_threads)


def _check_mesh(spec: LaunchSpec, config: Config) -> None:
    """Raise once, before a process starts, what each rank would raise for its mesh."""
    from faccel.config_mesh import mesh_for

    # With a range of nodes the world size is unknown, and one process here may be a task of many
    num_nodes = parse_count(spec.nnodes)
    if num_nodes is not None and (spec.nproc > 1 or num_nodes != 1):
        mesh_for(config, spec.nproc * num_nodes)


def _spec(command: tuple[str, ...], options: Mapping[str, Any]) -> tuple[LaunchSpec, Config]:
    """Convert the options of the command line to a launch, and the configuration of its ranks."""
    from faccel.config import LAUNCH
    from faccel.config_sources import resolve
    from faccel.launching.slurm import within_slurm
    from faccel.launching.spec import LaunchSpec
    from faccel.launching.tpu import is_tpu, within_tpu_pod

    flags = parse_flags(options)
    # `--cpu` becomes the field, so that the ranks need no second flag.
    if options["cpu"]:
        if flags.get("device", "cpu") != "cpu":
            raise LaunchError(
                "`--cpu` contradicts `--device`",
                got=f"`--cpu` and `--device {flags['device']}`",
                fix="remove one of the two options",
            )
        flags["device"] = "cpu"
    kind = _kind(options)
    file = _config_file(options["config"])
    config = resolve(env={**os.environ, LAUNCH: json.dumps(flags)}, file=file)
    # The option is stronger than the file, as for the fields.
    nproc, source = "auto", ""
    if file is not None and file.nproc is not None:
        nproc, source = file.nproc, f", from the {file.source(NPROC)}"
    if options["nproc"] is not None:
        nproc, source = options["nproc"], ""
    spec = LaunchSpec(
        command=command,
        kind=kind,
        nproc=_num_processes(nproc, config, source),
        flags=flags,
        **{name: options[name] for name in _SPEC_FIELDS},
    )
    if options["rendering"]:
        # A text for other nodes must not depend on the SLURM job or the variables of this one.
        named = resolve(env={LAUNCH: json.dumps(flags)}, file=file).device or ""
        return attrs.evolve(spec, device=named.partition(":")[0]), config
    has_nproc = options["nproc"] not in (None, "auto")
    spec = within_slurm(spec, os.environ, has_nproc=has_nproc)
    if is_tpu(config):
        spec = within_tpu_pod(spec, os.environ)
    return spec, config


def _config_file(reference: str | None) -> ConfigFile | None:
    """Return the file that the ranks will read: that of `--config`, else of the environment."""
    from faccel.config_file import absolute, find, read

    if reference is not None:
        return read(absolute(reference))
    default = find(os.environ)
    if default is None:
        return None
    return read(default)


def _kind(options: Mapping[str, Any]) -> str:
    if options["module"] and options["no_python"]:
        raise LaunchError(
            "SCRIPT is either a module or an executable",
            got="`-m` and `--no-python`",
            fix="remove one of the two options",
        )
    if options["module"]:
        return "module"
    if options["no_python"]:
        return "executable"
    return "script"


def _num_processes(nproc: str, config: Config, source: str) -> int:
    """Return the number of processes for `nproc` and the device of the configuration.

    PyTorch is imported only if the number depends on the accelerators.
    """
    is_number = bool(parse_count(nproc))
    if nproc not in NPROC_WORDS and not is_number:
        raise LaunchError(
            "`--nproc` must be a number of processes, or one of auto, cpu, gpu",
            got=f"--nproc {short_text(nproc)}",
            fix="write for example `--nproc 2`",
        )
    # Before the test for devices: `--nproc cpu` counts cores, also with `--device cuda`.
    if nproc == "cpu":
        return os.cpu_count() or 1
    if nproc == "1":
        return 1
    is_cpu = (config.device or "").startswith("cpu")
    if is_cpu and nproc == "auto":
        return 1
    if is_cpu and is_number:
        return int(nproc)
    return _num_processes_on_devices(nproc, config, source)


def _num_processes_on_devices(nproc: str, config: Config, source: str) -> int:
    """Return the number of processes, at most one per accelerator if there are accelerators."""
    import torch

    num_devices = 0
    if torch.accelerator.is_available():
        num_devices = torch.accelerator.device_count()
    # With `--nproc 2` alone and no accelerator, the ranks compute on the CPU.
    if num_devices == 0 and (config.device or nproc == "gpu"):
        raise _no_accelerator(config, source)
    if nproc in NPROC_WORDS:
        return max(1, num_devices)
    if num_devices and int(nproc) > num_devices:
        raise LaunchError(
            "`--nproc` is larger than the number of devices",
            got=f"{nproc} processes, {num_devices} devices{source}",
            fix=f"use `--nproc {num_devices}`, or `--cpu`",
        )
    return int(nproc)


def _no_accelerator(config: Config, nproc_source: str) -> LaunchError:
    fix = "write `--cpu --nproc 2`"
    if config.device is None:
        got = f"no accelerator{nproc_source}"
        return LaunchError("`--nproc gpu` needs a GPU or another accelerator", got=got, fix=fix)
    error = LaunchError(
        f"the device `{config.device}` needs a GPU or another accelerator",
        got="no accelerator",
        fix=fix,
    )
    return with_source(error, config.sources["device"])
