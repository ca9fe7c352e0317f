"""A launch as a value, the arguments of torchrun and the environment that follow from it."""

from __future__ import annotations

import json
from collections.abc import Mapping

import attrs

from faccel.checks import finite, local_path, one_of, parse_count
from faccel.config import LAUNCH
from faccel.config_file import VARIABLE, absolute
from faccel.errors import LaunchError, short_text

_KIND_OPTIONS: Mapping[str, tuple[str, ...]] = {
    "script": (),
    "module": ("--module",),
    "executable": ("--no-python",),
}
NUMA_BINDINGS = ("node", "socket", "exclusive", "core-complex")
"""Which CPU cores torchrun binds a process to: those near its GPU."""
_STATIC_PORT = 29500  # the default ports of torchrun
_ELASTIC_PORT = 29400
_MAX_PORT = 65535


@attrs.frozen(kw_only=True)
class LaunchSpec:
    """What `faccel launch` starts, how often and where.

    Args:
        command: A script, module or executable, and its arguments.
        kind: `"script"`, `"module"` or `"executable"`: what the first word of `command` is.
        nproc: Processes on this node.
        nnodes: Number of nodes, or a range as in `"1:4"`.
        node_rank: Rank of this node; required with `main_address`.
        main_address: Host of node 0, where the nodes rendezvous.
        main_port: Port on node 0; None takes a free port if there is one node.
        rdzv_endpoint: `host:port` of an elastic rendezvous, instead of `main_address`.
        rdzv_id: Name of the run, the same on all nodes of an elastic rendezvous.
        join_timeout_s: Seconds that nodes wait for each other before they raise an error.
        hang_report_s: Seconds without a collective or a step after which a hang is reported, in a
            run with a run folder; 0 is never.
        max_restarts: How often all processes are restarted after a failure.
        log_dir: Folder for the output of each process.
        tee: Whether the output is also printed.
        numa_binding: One of `NUMA_BINDINGS`; None does not bind. Needs GPUs.
        flags: Fields of `Config` that were set by flags.
        config: Configuration file, as `path` or `path#section`.
        device: Type of the devices that flags and file name; "" takes the devices of each node.

    Raises:
        LaunchError: The fields contradict each other.
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
    hang_report_s: float = 300.0
    max_restarts: int = 0
    log_dir: str | None = None
    tee: bool = False
    numa_binding: str | None = None
    flags: Mapping[str, object] = attrs.field(factory=dict)
    config: str | None = None
    device: str = ""

    def __attrs_post_init__(self) -> None:
        one_of("kind", self.kind, _KIND_OPTIONS, LaunchError)
        if self.numa_binding is not None:
            one_of("numa_binding", self.numa_binding, NUMA_BINDINGS, LaunchError)
        _check_nnodes(self)
        finite("join_timeout_s", self.join_timeout_s, at_least=1, error=LaunchError)
        finite("hang_report_s", self.hang_report_s, at_least=0, error=LaunchError)
        if self.tee and self.log_dir is None:
            raise LaunchError(
                "`--tee` needs a folder for the logs",
                got="no `--log-dir`",
                fix="add `--log-dir DIR`, or remove `--tee`",
            )
        if self.log_dir is not None:
            local_path("log_dir", self.log_dir, LaunchError)
        _check_rendezvous(self)

    @property
    def is_single_process(self) -> bool:
        """Whether the command needs no supervision, so that it can replace this process."""
        is_alone = self.nproc == 1 and self.nnodes == "1" and self.rdzv_endpoint is None
        has_agent = self.max_restarts > 0 or self.log_dir is not None
        return is_alone and not has_agent and self.numa_binding is None


def _check_nnodes(spec: LaunchSpec) -> None:
    low, _, high = spec.nnodes.partition(":")
    # A single number is a range from it to itself.
    smallest, largest = parse_count(low), parse_count(high or low)
    if not smallest or not largest or smallest > largest:
        raise LaunchError(
            "`--nnodes` must be a number of nodes or a range MIN:MAX",
            got=f"--nnodes {short_text(spec.nnodes)}",
            fix="write `--nnodes 2`, or `--nnodes 1:4`",
        )
    # Nodes of a range have no fixed ranks.
    if high or spec.node_rank is None:
        return
    if not 0 <= spec.node_rank < smallest:
        raise LaunchError(
            "`--node-rank` must be less than `--nnodes`",
            got=f"--node-rank {spec.node_rank} with --nnodes {low}",
            fix=f"use 0 to {smallest - 1}",
        )


def _check_rendezvous(spec: LaunchSpec) -> None:
    rendezvous_address(spec)  # raises if the port is not a number
    if ":" in spec.nnodes and spec.rdzv_endpoint is None:
        raise LaunchError(
            "a range of nodes needs an elastic rendezvous",
            got=f"--nnodes {spec.nnodes} without `--rdzv-endpoint`",
            fix="add `--rdzv-endpoint HOST:PORT`",
        )
    is_static = spec.main_address is not None or spec.node_rank is not None
    if spec.rdzv_endpoint is not None and is_static:
        raise LaunchError(
            "`--rdzv-endpoint` excludes `--main-address` and `--node-rank`",
            got="both kinds of rendezvous",
            fix="remove `--rdzv-endpoint`, or the other two options",
        )


def check_complete(spec: LaunchSpec) -> None:
    """Raise if several nodes have no rendezvous.

    This is not part of the checks of `LaunchSpec`: under SLURM and mpirun the address comes from
    the environment.

    Effects: pure.

    Raises:
        LaunchError: Neither a main address nor an elastic rendezvous is set.
    """
    if spec.nnodes == "1" or spec.rdzv_endpoint is not None:
        return
    if spec.main_address is None or spec.node_rank is None:
        raise LaunchError(
            "several nodes need the address of a rendezvous",
            got=f"--nnodes {spec.nnodes}",
            fix=(
                "add `--node-rank R --main-address HOST --main-port P` on each node, "
                "or `--rdzv-endpoint HOST:PORT` on all"
            ),
        )


def rendezvous_address(spec: LaunchSpec) -> tuple[str, int]:
    """Return the host and the port of the rendezvous of the nodes.

    Effects: pure.

    Raises:
        LaunchError: The port of `rdzv_endpoint` is not a number.

    Examples:
        >>> rendezvous_address(LaunchSpec(command=("train.py",), rdzv_endpoint="head"))
        ('head', 29400)
    """
    if spec.rdzv_endpoint is None:
        port = _STATIC_PORT
        if spec.main_port is not None:
            port = spec.main_port
        return spec.main_address or "127.0.0.1", port
    host, mark, text = spec.rdzv_endpoint.rpartition(":")
    if not mark:
        return spec.rdzv_endpoint, _ELASTIC_PORT
    # The port may be missing after the colon, as torchrun allows.
    port = parse_count(text or str(_ELASTIC_PORT))
    if port is None or port > _MAX_PORT:
        raise LaunchError(
            "`--rdzv-endpoint` must be a host and a port",
            got=f"--rdzv-endpoint {short_text(spec.rdzv_endpoint)}",
            fix="write `--rdzv-endpoint host:29400`",
        )
    return host, port


def torchrun_arguments(spec: LaunchSpec) -> list[str]:
    """Return the arguments of `torchrun` (`torch.distributed.run`).

    Effects: pure.

    Raises:
        LaunchError: Several nodes have no rendezvous.

    Examples:
        >>> torchrun_arguments(LaunchSpec(command=("train.py", "--lr", "1"), nproc=2))[:3]
        ['--nnodes', '1', '--nproc-per-node']
    """
    check_complete(spec)
    arguments = ["--nnodes", spec.nnodes, "--nproc-per-node", str(spec.nproc)]
    # Always explicit: the defaults of torchrun have changed between versions.
    arguments += ["--max-restarts", str(spec.max_restarts)]
    arguments += _rendezvous_arguments(spec)
    if spec.log_dir is not None:
        output = "--redirects"
        if spec.tee:
            output = "--tee"
        arguments += ["--log-dir", spec.log_dir, output, "3"]  # 3: stdout and stderr
    if spec.numa_binding is not None:  # torchrun has none by default
        arguments += ["--numa-binding", spec.numa_binding]
    arguments += _KIND_OPTIONS[spec.kind]
    return [*arguments, "--", *spec.command]


def _rendezvous_arguments(spec: LaunchSpec) -> list[str]:
    if spec.rdzv_endpoint is not None:
        arguments = ["--rdzv-backend", "c10d", "--rdzv-endpoint", spec.rdzv_endpoint]
        return [*arguments, "--rdzv-id", spec.rdzv_id]
    if spec.nnodes == "1" and spec.main_port is None:
        return ["--standalone"]  # torchrun takes a free port
    arguments = []
    if spec.node_rank is not None:
        arguments = ["--node-rank", str(spec.node_rank)]
    host, port = rendezvous_address(spec)
    return [*arguments, "--master-addr", host, "--master-port", str(port)]


def environment_of(spec: LaunchSpec, env: Mapping[str, str], num_cores: int) -> dict[str, str]:
    """Return the variables that a launch adds to the environment of its processes.

    Effects: pure.

    Args:
        spec: The launch.
        env: The environment of the launcher. None of its variables is changed, so that
            `FACCEL_SEED=1 faccel launch --seed 3` can report both values.
        num_cores: Number of CPU cores, which the processes share.

    Examples:
        >>> spec = LaunchSpec(command=("x.py",), nproc=2, flags={"seed": 3})
        >>> environment_of(spec, {"FACCEL_SEED": "1"}, 8)
        {'FACCEL_LAUNCH': '{"seed": 3}', 'OMP_NUM_THREADS': '4'}
    """
    flags = dict(spec.flags)
    variables: dict[str, str] = {}
    if spec.config is not None:
        # Absolute, because a rank may change its folder before `faccel.init`.
        variables[VARIABLE] = absolute(spec.config)
        flags["config"] = variables[VARIABLE]
    # As JSON in one variable, so that flags stay distinguishable from the environment.
    variables[LAUNCH] = json.dumps(flags)
    if "OMP_NUM_THREADS" not in env and spec.nproc > 1:
        # torchrun would set 1 and log a warning
        variables["OMP_NUM_THREADS"] = str(max(1, num_cores // spec.nproc))
    return variables
