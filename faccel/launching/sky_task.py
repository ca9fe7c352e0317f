"""A launch as a task of SkyPilot, for `sky jobs launch`."""

from __future__ import annotations

from typing import Any

from faccel.launching.node_command import SAVED, check_no_addresses, node_command, num_nodes_of
from faccel.launching.spec import LaunchSpec
from faccel.launching.yaml_text import as_yaml

# The first line has the address of node 0.
_ADDRESS = 'address=$(echo "$SKYPILOT_NODE_IPS" | head -n 1)\n'
_COMMENT = """\
# Replace GPU by a type such as H100, add `setup` for packages and `file_mounts` for checkpoints,
# then start it by: sky jobs launch FILE
# After a preemption with a saved checkpoint (exit code 75) SkyPilot starts the task again."""


def as_sky(spec: LaunchSpec) -> str:
    """Return a task of SkyPilot that is recovered after a preemption.

    Effects: pure.

    Raises:
        LaunchError: The launch names its nodes, or has a range of nodes.
    """
    num_nodes = num_nodes_of(spec)
    check_no_addresses(spec, "SkyPilot")
    resources: dict[str, Any] = {"accelerators": f"GPU:{spec.nproc}"}
    # At least as many cores as ranks; without accelerators SkyPilot takes a small node.
    if spec.device == "cpu":
        resources = {"cpus": f"{spec.nproc}+"}
    # `max_restarts_on_errors` stays 0: the other exit codes are errors of the script.
    resources["job_recovery"] = {"recover_on_exit_codes": [SAVED]}
    script = node_command(spec, '"$SKYPILOT_NODE_RANK"', '"$address"') + "\n"
    if num_nodes > 1:
        script = _ADDRESS + script
    document = {
        "name": "faccel",
        "num_nodes": num_nodes,
        "workdir": ".",
        "resources": resources,
        "run": script,
    }
    return as_yaml(document, _COMMENT)
