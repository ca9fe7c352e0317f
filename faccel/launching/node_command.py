"""The command that starts the ranks of one node, for files of other launchers."""

from __future__ import annotations

import shlex
from collections.abc import Mapping

import attrs

from faccel.config import flag_of
from faccel.errors import LaunchError
from faccel.launching.spec import LaunchSpec

SAVED = 75
"""`Preemption.exit_code`: the script saved a checkpoint, and the same command resumes from it."""

OPTION: Mapping[str, tuple[str, ...]] = {
    "script": (),
    "module": ("-m",),
    "executable": ("--no-python",),
}
"""The option of `faccel launch` for each kind of command."""


def num_nodes_of(spec: LaunchSpec) -> int:
    """Return the number of nodes.

    Effects: pure.

    Raises:
        LaunchError: It is a range.
    """
    # A file requests its nodes before it starts.
    if ":" in spec.nnodes:
        raise LaunchError(
            "a batch job needs a fixed number of nodes",
            got=f"--nnodes {spec.nnodes}",
            fix="write one number, for example `--nnodes 2`",
        )
    return int(spec.nnodes)


def check_no_addresses(spec: LaunchSpec, setter: str) -> None:
    """Raise if the launch names its nodes, which the other launcher does.

    Effects: pure.

    Args:
        spec: The launch.
        setter: What numbers the nodes and sets their addresses.

    Raises:
        LaunchError: An option of the launch sets a rank or an address.
    """
    options = {
        "--node-rank": spec.node_rank,
        "--main-address": spec.main_address,
        "--rdzv-endpoint": spec.rdzv_endpoint,
    }
    for option, value in options.items():
        if value is not None:
            raise LaunchError(
                f"{setter} numbers the nodes and sets their addresses",
                got=f"{option} {value}",
                fix="remove `--node-rank`, `--main-address` and `--rdzv-endpoint`",
            )


def node_command(spec: LaunchSpec, node_rank: str = "", main_address: str = "") -> str:
    """Return `faccel launch` for one node, as a line of a shell script.

    Effects: pure.

    Args:
        spec: The launch.
        node_rank: Text of the shell for the rank of the node, such as `"$RANK"`.
        main_address: Text of the shell for the host of node 0.

    Examples:
        >>> spec = LaunchSpec(command=("train.py", "a b"), nproc=8)
        >>> print(node_command(spec))
        faccel launch --nproc 8 train.py 'a b'
    """
    words = ["faccel launch", "--nproc", str(spec.nproc)]
    # One node needs no rendezvous, and takes a free port.
    if num_nodes_of(spec) > 1 and node_rank:
        words += ["--nnodes", spec.nnodes, "--node-rank", node_rank, "--main-address", main_address]
    # The words above have expressions of the shell, which a quotation would protect.
    return " ".join([*words, shlex.join(node_words(spec))])


def node_words(spec: LaunchSpec) -> list[str]:
    """Return the words of `faccel launch` that are the same on all nodes: options and script.

    Effects: pure.
    """
    words: list[str] = []
    # The configuration as it was written: the path is resolved in the folder of the job.
    options = {
        "--config": spec.config,
        "--main-port": spec.main_port,
        "--max-restarts": spec.max_restarts,
        "--numa-binding": spec.numa_binding,
        "--log-dir": spec.log_dir,
    }
    for option, value in options.items():
        if value:
            words += [option, str(value)]
    # They always have a value, and the default would only lengthen the line.
    defaults = attrs.fields(LaunchSpec)
    if spec.join_timeout_s != defaults.join_timeout_s.default:
        words += ["--join-timeout", f"{spec.join_timeout_s:g}"]
    if spec.hang_report_s != defaults.hang_report_s.default:
        words += ["--hang-report", f"{spec.hang_report_s:g}"]
    if spec.tee:
        words.append("--tee")
    # As flags, not in a variable: people edit the file.
    for name, value in spec.flags.items():
        words += _flag(name, value)
    return [*words, *OPTION[spec.kind], *spec.command]


def _flag(name: str, value: object) -> list[str]:
    """Return the words of the command line that set a field of the configuration."""
    flag = flag_of(name)
    # Switches have no value on the command line.
    if value is True:
        return [flag]
    if value is False:
        return [f"--no-{flag[2:]}"]
    return [flag, str(value)]
