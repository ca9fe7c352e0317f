"""`faccel launch`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import click

from faccel.cli.flags import UsageError, config_flags, given_fields
from faccel.cli.output import json_option
from faccel.errors import FaccelError, LaunchError

_NPROC = ("auto", "cpu", "gpu")
_NPROC_HELP = "Processes on this machine; auto is one per GPU, else one."


def launch_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options that say what is started where, and a flag for each field of `Config`."""
    command = config_flags(command)
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


_OPTIONS = (
    click.option(
        "--nproc", default="auto", metavar="N|auto|cpu|gpu", show_default=True, help=_NPROC_HELP
    ),
    click.option("--cpu", is_flag=True, help="Compute on the CPU: `--device cpu`."),
    click.option("--nnodes", default="1", show_default=True, metavar="N|MIN:MAX", help="Machines."),
    click.option("--node-rank", type=int, help="Number of this machine, from 0."),
    click.option("--main-address", metavar="HOST", help="The machine that the others meet at."),
    click.option(
        "--main-port",
        type=click.IntRange(1, 65535),
        help="Its port; a free one on a single machine.",
    ),
    click.option(
        "--rdzv-endpoint", metavar="HOST:PORT", help="Where machines meet that may come and go."
    ),
    click.option(
        "--rdzv-id", default="faccel", show_default=True, help="Name of the run at that place."
    ),
    click.option(
        "--join-timeout",
        "join_timeout_s",
        type=click.FloatRange(1),
        default=600,
        show_default=True,
        metavar="SECONDS",
        help="How long machines wait for each other.",
    ),
    click.option(
        "--max-restarts",
        type=click.IntRange(0),
        default=0,
        show_default=True,
        help="Starts after a failure.",
    ),
    click.option("--log-dir", metavar="DIR", help="Keep what each process prints."),
    click.option("--tee", is_flag=True, help="With --log-dir: print it too."),
    click.option(
        "--config", metavar="FILE[#SECTION]", help="Configuration file, or a section of yours."
    ),
)


@click.command(context_settings={"ignore_unknown_options": False, "allow_interspersed_args": False})
@launch_options
@click.option("-m", "--module", is_flag=True, help="SCRIPT is a module.")
@click.option("--no-python", is_flag=True, help="SCRIPT is a program.")
@click.option(
    "--print",
    "rendering",
    type=click.Choice(("mpirun", "slurm", "torchrun")),
    help="Write it for that.",
)
@click.argument("script")
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
def launch(script: str, args: tuple[str, ...], **options: Any) -> None:
    """Run SCRIPT with its ARGS on every process that is asked for.

    All options come before SCRIPT; what follows it is the script's own. Fields of the configuration given here are
    stronger than the environment and a file, and must not contradict what the script gives to `faccel.init`.
    """
    _launch((script, *args), options)


@click.command()
@launch_options
@json_option
def test(*, as_json: bool, **options: Any) -> None:
    """Start the ranks and check what they compute: collectives, data order, training, a checkpoint, bandwidth."""
    words = ("faccel.testing.selftest", *(["--json"] if as_json else []))
    _launch(words, options | {"module": True, "no_python": False, "rendering": None})


def _launch(command: tuple[str, ...], options: dict[str, Any]) -> None:
    from faccel.launching.run import run

    try:
        spec = _spec(command, options)
        if options["rendering"]:
            from faccel.launching.render import RENDERINGS

            print(RENDERINGS[options["rendering"]](spec), end="")
            return
        _check(spec)
    except FaccelError as error:
        raise UsageError(error) from None
    try:
        code = run(spec, os.environ)
    except LaunchError as error:
        raise UsageError(error) from None
    except FaccelError as error:
        raise click.ClickException(str(error)) from None
    sys.exit(code)


def _check(spec: Any) -> None:
    """Find here what each rank would find in the configuration."""
    from faccel.config import resolve
    from faccel.config_file import find, read
    from faccel.launching.spec import additions

    env = {**os.environ, **additions(spec, os.environ, 1)}
    file = find(env)
    config = resolve(env=env, file=None if file is None else read(file))
    if (
        config.mesh is not None
        and spec.nnodes.isdecimal()
        and (spec.nproc > 1 or spec.nnodes != "1")
    ):
        config.mesh.fill(spec.nproc * int(spec.nnodes))


def _spec(command: tuple[str, ...], options: dict[str, Any]) -> Any:
    from faccel.launching.slurm import within_slurm
    from faccel.launching.spec import LaunchSpec

    flags = given_fields(options)
    if options["cpu"]:
        if flags.get("device", "cpu") != "cpu":
            raise LaunchError(
                "`--cpu` is `--device cpu`",
                got=f"--device {flags['device']} too",
                fix="leave one out",
            )
        flags["device"] = "cpu"
    if options["module"] and options["no_python"]:
        raise LaunchError(
            "SCRIPT is a module or a program", got="`-m` and `--no-python`", fix="leave one out"
        )
    kind = "module" if options["module"] else "executable" if options["no_python"] else "script"
    same = ("nnodes", "node_rank", "main_address", "main_port", "rdzv_endpoint", "rdzv_id", "join_timeout_s",
            "max_restarts", "log_dir", "tee", "config")  # fmt: skip
    spec = LaunchSpec(
        command=command,
        kind=kind,
        nproc=_processes(options["nproc"], str(flags.get("device") or "")),
        flags=flags,
        **{name: options[name] for name in same},
    )
    return (
        spec
        if options["rendering"]
        else within_slurm(spec, os.environ, is_counted=options["nproc"] != "auto")
    )


def _processes(nproc: str, device: str) -> int:
    if nproc not in _NPROC and not (nproc.isdecimal() and int(nproc) > 0):
        raise LaunchError(
            "`--nproc` is a number of processes",
            got=nproc,
            fix=f"use 1, 2, ... or {', '.join(_NPROC)}",
        )
    if nproc == "cpu":
        return os.cpu_count() or 1
    if device.startswith("cpu") and nproc != "gpu":
        return 1 if nproc == "auto" else int(nproc)
    if nproc == "1":
        return 1
    return _on_devices(nproc, device)


def _on_devices(nproc: str, device: str) -> int:
    import torch

    count = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    if not count and (device or nproc == "gpu"):
        asked = f"`--device {device}`" if device else "`--nproc gpu`"
        raise LaunchError(
            f"there is no GPU or other device for {asked}",
            got="no accelerator",
            fix="write `--cpu --nproc 2`",
        )
    if nproc in _NPROC:
        return max(1, count)
    if count and int(nproc) > count:
        fix = f"use `--nproc {count}`, or `--cpu`"
        raise LaunchError(
            "each process needs a device of its own",
            got=f"{nproc} processes, {count} devices",
            fix=fix,
        )
    return int(nproc)
