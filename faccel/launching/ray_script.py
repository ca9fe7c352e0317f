"""A launch as a script that starts it on the nodes of a Ray cluster."""

from __future__ import annotations

from faccel.launching.node_command import SAVED, check_no_addresses, node_words, num_nodes_of
from faccel.launching.spec import LaunchSpec

# `str.format` of four values, so that the script has no braces of its kind.
_SCRIPT = '''\
"""Start it by: ray job submit --working-dir . -- python FILE

After a preemption with a saved checkpoint (exit code {saved}) the nodes start again.
"""

import socket
import subprocess
import sys

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

# The launch: faccel starts the ranks of a node, and an actor starts faccel.
NUM_NODES = {num_nodes}
NUM_PROCESSES = {nproc}  # per node
RESOURCES = {resources}  # of a node
OPTIONS = {words}
SAVED = {saved}


@ray.remote(max_restarts=0)
class Node:
    def address(self):
        # The rendezvous of the nodes. The port is free now, and taken in seconds.
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def run(self, node_rank, host, port):
        words = ["--nproc", NUM_PROCESSES]
        if NUM_NODES > 1:
            words += ["--nnodes", NUM_NODES, "--node-rank", node_rank]
            words += ["--main-address", host, "--main-port", port]
        command = [sys.executable, "-m", "faccel", "launch", *map(str, words), *OPTIONS]
        return subprocess.run(command).returncode


def run_once():
    """Run the ranks of all nodes; return the exit code."""
    # One bundle for each node, so that no node has two of them.
    group = placement_group([RESOURCES] * NUM_NODES, strategy="STRICT_SPREAD")
    ray.get(group.ready())
    nodes = []
    for index in range(NUM_NODES):
        strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
        options = Node.options(
            num_cpus=RESOURCES["CPU"],
            num_gpus=RESOURCES.get("GPU", 0),
            scheduling_strategy=strategy,
        )
        nodes.append(options.remote())
    try:
        host, port = ray.get(nodes[0].address.remote())
        codes = ray.get([node.run.remote(i, host, port) for i, node in enumerate(nodes)])
    finally:
        # It ends the actors, whose processes end with them.
        remove_placement_group(group)
    # A failure is stronger than a saved checkpoint, which is stronger than success.
    failures = [code for code in codes if code not in (0, SAVED)]
    return [*failures, max(codes)][0]


ray.init()
# Nothing else is repeated: a rank that fails for another reason would fail again.
code = SAVED
while code == SAVED:
    code = run_once()
sys.exit(code)
'''


def as_ray(spec: LaunchSpec) -> str:
    """Return a Python script that `ray job submit` runs: an actor on each node runs its ranks.

    Effects: pure.

    Raises:
        LaunchError: The launch names its nodes, or has a range of nodes.
    """
    num_nodes = num_nodes_of(spec)
    check_no_addresses(spec, "Ray")
    # One core and one GPU for each rank; Ray sets CUDA_VISIBLE_DEVICES.
    resources = {"CPU": spec.nproc, "GPU": spec.nproc}
    if spec.device == "cpu":
        del resources["GPU"]
    # `repr` of the values, which is Python.
    return _SCRIPT.format(
        num_nodes=num_nodes,
        nproc=spec.nproc,
        resources=resources,
        words=node_words(spec),
        saved=SAVED,
    )
