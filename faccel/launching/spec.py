"""A launch as values: what is started, how often and where; the arguments and environment that follow from it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import attrs

from faccel.config import LAUNCH
from faccel.config_file import VARIABLE, absolute
from faccel.errors import LaunchError


@attrs.frozen(kw_only=True)
class LaunchSpec:
    """What `faccel launch` was asked for.

    Args:
        command: A script, module or executable, and its arguments.
        kind: `"script"`, `"module"` or `"executable"`: what the first word of `command` is.
        nproc: Processes on this machine.
        nnodes: Machines, or a range of them as in `"1:4"`.
        node_rank: Number of this machine, where several meet at `main_address`.
        main_address: The machine that the others meet at.
        main_port: Its port; None takes a free one on a single machine.
        rdzv_endpoint: `host:port` of an elastic rendezvous, instead of `main_address`.
        rdzv_id: Name of the run, the same on all machines of a rendezvous.
        join_timeout_s: Seconds until machines that do not come together are an error.
        max_restarts: How often all processes are started again after one has failed.
        log_dir: Where what each process prints is kept.
        tee: Whether it is printed too.
        flags: Fields of `Config` that were given as flags.
        config: The configuration file that was named.
    """

    command: tuple[str, ...]
    kind: str = "script"
    nproc: int = 1
    nnodes: str = "1"
    node_rank: int | None = None
    main_address: str | None = None
    main_port: int | None = None
    rdzv_endpoint: str | None = None
    rdzv_id: str = "faccel"
    join_timeout_s: float = 600.0
    max_restarts: int = 0
    log_dir: str | None = None
    tee: bool = False
    flags: Mapping[str, Any] = attrs.field(factory=dict)
    config: str | None = None

    def __attrs_post_init__(self) -> None:
        low, _, high = self.nnodes.partition(":")
        if not all(n.isdecimal() and int(n) > 0 for n in (low, high or low)) or int(
            high or low
        ) < int(low):
            fix = "write `--nnodes 2`, or `--nnodes 1:4`"
            raise LaunchError(
                "`--nnodes` is a number of machines or a range",
                got=f"--nnodes {self.nnodes}",
                fix=fix,
            )
        if (
            ":" not in self.nnodes
            and self.node_rank is not None
            and not 0 <= self.node_rank < int(low)
        ):
            got = f"--node-rank {self.node_rank} of {low}"
            raise LaunchError(
                "machines are numbered from 0", got=got, fix=f"use 0 to {int(low) - 1}"
            )
        if self.tee and self.log_dir is None:
            fix = "add `--log-dir DIR`, or leave it out"
            raise LaunchError("`--tee` prints what goes to a log", got="no `--log-dir`", fix=fix)
        meeting_place(self)
        if ":" in self.nnodes and self.rdzv_endpoint is None:
            fix = "add `--rdzv-endpoint HOST:PORT`"
            raise LaunchError(
                "a range of machines needs an elastic rendezvous",
                got=f"--nnodes {self.nnodes}",
                fix=fix,
            )
        if self.rdzv_endpoint is not None and (self.main_address or self.node_rank is not None):
            raise LaunchError(
                "machines meet at a rendezvous or at a main address",
                got="`--rdzv-endpoint` beside `--main-address` or `--node-rank`",
                fix="leave one of them out",
            )

    @property
    def is_single_process(self) -> bool:
        """Whether nothing has to be supervised: the command is simply run."""
        is_alone = self.nproc == 1 and self.nnodes == "1" and self.rdzv_endpoint is None
        return is_alone and self.max_restarts == 0 and self.log_dir is None


def check_meeting(spec: LaunchSpec) -> None:
    """Refuse several machines that do not know where they meet; SLURM and mpirun know it by themselves.

    Effects: pure.

    Raises:
        LaunchError: Neither a main address nor a rendezvous was named.
    """
    if (
        spec.nnodes != "1"
        and spec.rdzv_endpoint is None
        and (spec.main_address is None or spec.node_rank is None)
    ):
        raise LaunchError(
            "several machines have to know where they meet",
            got=f"--nnodes {spec.nnodes}",
            fix="give each `--node-rank R --main-address HOST --main-port P`, or all `--rdzv-endpoint HOST:PORT`",
        )


def arguments(spec: LaunchSpec) -> list[str]:
    """Return the arguments of `torch.distributed.run`, which is torchrun.

    Effects: pure.

    Examples:
        >>> arguments(LaunchSpec(command=("train.py", "--lr", "1"), nproc=2, main_port=29500))[:3]
        ['--nnodes', '1', '--nproc-per-node']
    """
    check_meeting(spec)
    given = [
        "--nnodes",
        spec.nnodes,
        "--nproc-per-node",
        str(spec.nproc),
        "--max-restarts",
        str(spec.max_restarts),
    ]
    given += _meeting(spec)
    if spec.log_dir is not None:
        given += ["--log-dir", spec.log_dir, "--redirects" if not spec.tee else "--tee", "3"]
    given += {"script": [], "module": ["--module"], "executable": ["--no-python"]}[spec.kind]
    return [*given, "--", *spec.command]


def meeting_place(spec: LaunchSpec) -> tuple[str, int]:
    """Return the host and port at which the machines of a launch meet.

    Effects: pure.

    Raises:
        LaunchError: The port of the rendezvous is not a number.
    """
    if spec.rdzv_endpoint is None:
        return spec.main_address or "127.0.0.1", 29500 if spec.main_port is None else spec.main_port
    host, _, port = (
        spec.rdzv_endpoint.rpartition(":")
        if ":" in spec.rdzv_endpoint
        else (spec.rdzv_endpoint, "", "")
    )
    if port and not port.isdecimal():
        got = f"--rdzv-endpoint {spec.rdzv_endpoint}"
        raise LaunchError(
            "a rendezvous is a host and a port", got=got, fix="write `--rdzv-endpoint host:29400`"
        )
    return host, int(port or 29400)


def _meeting(spec: LaunchSpec) -> list[str]:
    if spec.rdzv_endpoint is not None:
        return [
            "--rdzv-backend",
            "c10d",
            "--rdzv-endpoint",
            spec.rdzv_endpoint,
            "--rdzv-id",
            spec.rdzv_id,
        ]
    if spec.nnodes == "1" and spec.main_port is None:
        return ["--standalone"]  # a port that is free
    node = [] if spec.node_rank is None else ["--node-rank", str(spec.node_rank)]
    host, port = meeting_place(spec)
    return [*node, "--master-addr", host, "--master-port", str(port)]


def additions(spec: LaunchSpec, env: Mapping[str, str], num_cores: int) -> dict[str, str]:
    """Return what the processes find in their environment besides `env`, of which nothing is changed.

    Effects: pure.

    Examples:
        >>> additions(LaunchSpec(command=("x.py",), nproc=2, flags={"seed": 3}), {"FACCEL_SEED": "1"}, 8)
        {'FACCEL_LAUNCH': '{"seed": 3}', 'OMP_NUM_THREADS': '4'}
    """
    more = {LAUNCH: json.dumps(dict(spec.flags))}
    if spec.config is not None:
        more[VARIABLE] = absolute(spec.config)
        more[LAUNCH] = json.dumps({**spec.flags, "config": more[VARIABLE]})
    if "OMP_NUM_THREADS" not in env and spec.nproc > 1:
        more["OMP_NUM_THREADS"] = str(max(1, num_cores // spec.nproc))
    return more
