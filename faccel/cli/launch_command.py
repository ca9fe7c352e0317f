"""`faccel launch` and `faccel test`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import click

from faccel.cli.flags import UsageError, config_flags, parse_flags
from faccel.cli.output import json_option
from faccel.errors import FaccelError, LaunchError

if TYPE_CHECKING:
    from faccel.launching.spec import LaunchSpec

CommandT = TypeVar("CommandT", bound=Callable[..., None])
_AUTOMATIC = ("auto", "cpu", "gpu")
# Options of the command line that are fields of `LaunchSpec` under the same name.
_SPEC_FIELDS = (
    "nnodes",
    "node_rank",
    "main_address",
    "main_port",
    "rdzv_endpoint",
    "rdzv_id",
    "join_timeout_s",
    "max_restarts",
    "log_dir",
    "tee",
    "config",
)


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
        default="auto",
        metavar="N|auto|cpu|gpu",
        show_default=True,
        help="Processes per node. auto: one per GPU, or one without GPUs.",
    ),
    click.option("--cpu", is_flag=True, help="Run on the CPU: short for `--device cpu`."),
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
        "--max-restarts",
        type=click.IntRange(0),
        default=0,
        show_default=True,
        help="Restarts of all processes after a failure.",
    ),
    click.option("--log-dir", metavar="DIR", help="Write the output of each process to DIR."),
    click.option("--tee", is_flag=True, help="With --log-dir: also print the output."),
    click.option("--config", metavar="FILE[#SECTION]", help="Configuration file or section."),
)


# Options after SCRIPT belong to the script, even if faccel has one of the same name.
@click.command(context_settings={"ignore_unknown_options": False, "allow_interspersed_args": False})
@launch_options
@click.option("-m", "--module", is_flag=True, help="SCRIPT is a Python module.")
@click.option("--no-python", is_flag=True, help="SCRIPT is an executable.")
@click.option(
    "--print",
    "rendering",
    type=click.Choice(("mpirun", "slurm", "torchrun")),
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


@click.command()
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

    try:
        # Errors up to here are about the command line: exit code 2, as click's own.
        spec = _spec(command, options)
        if options["rendering"]:
            from faccel.launching.render import RENDERINGS

            print(RENDERINGS[options["rendering"]](spec), end="")
            return
        _check_config(spec)
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


def _check_config(spec: LaunchSpec) -> None:
    """Raise once, before a process starts, what each rank would raise for its configuration."""
    from faccel.config import resolve
    from faccel.config_file import find, read
    from faccel.launching.spec import environment_of

    # The environment of the ranks; the number of cores does not matter here.
    env = {**os.environ, **environment_of(spec, os.environ, 1)}
    reference = find(env)
    file = None
    if reference is not None:
        file = read(reference)
    config = resolve(env=env, file=file)
    # With a range of nodes the world size is unknown, and one process here may be a task of many
    is_counted = spec.nnodes.isdecimal() and (spec.nproc > 1 or spec.nnodes != "1")
    if config.mesh is not None and is_counted:
        config.mesh.fill(spec.nproc * int(spec.nnodes))


def _spec(command: tuple[str, ...], options: Mapping[str, Any]) -> LaunchSpec:
    """Convert the options of the command line to a `LaunchSpec`."""
    from faccel.launching.slurm import within_slurm
    from faccel.launching.spec import LaunchSpec

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
    spec = LaunchSpec(
        command=command,
        kind=_kind(options),
        nproc=_num_processes(options["nproc"], str(flags.get("device") or "")),
        flags=flags,
        **{name: options[name] for name in _SPEC_FIELDS},
    )
    if options["rendering"]:
        return spec  # a text for another node must not depend on the SLURM job of this one
    return within_slurm(spec, os.environ, has_nproc=options["nproc"] != "auto")


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


def _num_processes(nproc: str, device: str) -> int:
    """Return the number of processes for `--nproc` and `--device`.

    PyTorch is imported only if the number depends on the accelerators.
    """
    is_number = nproc.isdecimal() and int(nproc) > 0
    if nproc not in _AUTOMATIC and not is_number:
        raise LaunchError(
            "`--nproc` must be a number of processes, or one of auto, cpu, gpu",
            got=f"--nproc {nproc}",
            fix="write for example `--nproc 2`",
        )
    # Before the test for devices: `--nproc cpu` counts cores, also with `--device cuda`.
    if nproc == "cpu":
        return os.cpu_count() or 1
    if nproc == "1":
        return 1
    if device.startswith("cpu") and nproc == "auto":
        return 1
    if device.startswith("cpu") and is_number:
        return int(nproc)
    return _num_processes_on_devices(nproc, device)


def _num_processes_on_devices(nproc: str, device: str) -> int:
    """Return the number of processes, at most one per accelerator if there are accelerators."""
    import torch

    num_devices = 0
    if torch.accelerator.is_available():
        num_devices = torch.accelerator.device_count()
    # With `--nproc 2` alone and no accelerator, the ranks compute on the CPU.
    if num_devices == 0 and (device or nproc == "gpu"):
        option = "`--nproc gpu`"
        if device:
            option = f"`--device {device}`"
        raise LaunchError(
            f"{option} needs a GPU or another accelerator",
            got="no accelerator",
            fix="write `--cpu --nproc 2`",
        )
    if nproc in _AUTOMATIC:
        return max(1, num_devices)
    if num_devices and int(nproc) > num_devices:
        raise LaunchError(
            "`--nproc` is larger than the number of devices",
            got=f"{nproc} processes, {num_devices} devices",
            fix=f"use `--nproc {num_devices}`, or `--cpu`",
        )
    return int(nproc)
