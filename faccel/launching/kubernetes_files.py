"""A launch as a JobSet, or as a PyTorchJob of Kubeflow, for `kubectl apply`.

A pod runs `faccel launch`, which starts the ranks of one node. Both files start all pods again
after a preemption with a saved checkpoint.
"""

from __future__ import annotations

import re
from typing import Any

from faccel.errors import LaunchError
from faccel.launching.node_command import SAVED, check_no_addresses, node_command, num_nodes_of
from faccel.launching.spec import LaunchSpec
from faccel.launching.yaml_text import as_yaml

_NAME = "faccel"
_GRACE_PERIOD_S = 120  # between SIGTERM and SIGKILL, for a checkpoint; 30 by default
# Without `--device`: the cluster may have other devices than this node.
_COMMON_RESOURCE = "nvidia.com/gpu"
# Node 0 listens on its address: its name resolves only after the pod is ready. RANK is the place
# of the variable with the rank of the pod.
_ADDRESS = """\
address={host}
if [ "${rank}" = 0 ]; then address=$POD_IP; fi
"""
# A shell that is the first process of a container ignores signals without a trap, and the first
# `wait` ends when the signal arrives. Kubeflow restarts pods for exit codes from 128 on.
_RETRYABLE = 138
_EXIT_CODES = f"""\
pid=$!
trap 'kill -TERM "$pid"' TERM
wait "$pid"; code=$?
while kill -0 "$pid" 2>/dev/null; do wait "$pid"; code=$?; done
# {SAVED}: a checkpoint is saved. The operator restarts pods with exit codes from 128 on only.
if [ "$code" -eq {SAVED} ]; then exit {_RETRYABLE}; fi
if [ "$code" -ge 128 ]; then exit 1; fi
exit "$code"
"""
_JOBSET_COMMENT = """\
# Replace IMAGE and add volumes for data and checkpoints, then start it by: kubectl apply -f FILE
# After a preemption with a saved checkpoint (exit code 75) all pods start again."""
_PYTORCHJOB_COMMENT = """\
# Replace IMAGE and add volumes for data and checkpoints, then start it by: kubectl apply -f FILE
# After a preemption with a saved checkpoint (exit code 75, here 138) the pods start again."""


def as_jobset(spec: LaunchSpec) -> str:
    """Return a JobSet with one pod for each node.

    A pod policy turns exit code 75 into the failure reason `PodFailurePolicy`, for which the JobSet
    starts again. Other failures end it.

    Effects: pure.

    Raises:
        LaunchError: The launch names its nodes, or has a range of nodes.
    """
    num_nodes = num_nodes_of(spec)
    host = f"{_NAME}-node-0-0.{_NAME}"  # JobSet, replicated job, job, pod; then the subdomain
    script = "exec " + _node_script(spec, "JOB_COMPLETION_INDEX")
    if num_nodes > 1:
        script = _ADDRESS.format(host=host, rank="JOB_COMPLETION_INDEX") + script
    job = {
        # All pods at once, and each has an index.
        "parallelism": num_nodes,
        "completions": num_nodes,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [
                {
                    "action": "FailJob",
                    "onExitCodes": {"containerName": _NAME, "operator": "In", "values": [SAVED]},
                }
            ]
        },
        "template": _pod_template(spec, _NAME, script, restart_policy="Never"),
    }
    # The reason that the policy above gives. Preemptions do not count as restarts.
    rule = {
        "name": "preempted",
        "action": "RestartJobSetAndIgnoreMaxRestarts",
        "onJobFailureReasons": ["PodFailurePolicy"],
    }
    document = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": _NAME},
        "spec": {
            "failurePolicy": {"maxRestarts": 0, "rules": [rule]},
            "replicatedJobs": [{"name": "node", "replicas": 1, "template": {"spec": job}}],
        },
    }
    return as_yaml(document, _JOBSET_COMMENT)


def as_pytorchjob(spec: LaunchSpec) -> str:
    """Return a PyTorchJob of Kubeflow's training operator, with one pod for each node.

    The operator restarts pods for exit codes from 128 on. The script of a pod turns 75 into 138,
    and the codes of ranks that a signal ended into 1.

    Effects: pure.

    Raises:
        LaunchError: The launch names its nodes, or has a range of nodes.
    """
    num_nodes = num_nodes_of(spec)
    # The operator's variables describe pods, and `faccel.init` would take them for ranks.
    script = "rank=$RANK\nunset RANK WORLD_SIZE MASTER_ADDR MASTER_PORT\n"
    if num_nodes > 1:
        script += _ADDRESS.format(host=f"{_NAME}-master-0", rank="rank")
    script += _node_script(spec, "rank").rstrip("\n") + " &\n" + _EXIT_CODES
    # The operator looks for the container of this name, and sets the policy of the pods itself.
    template = _pod_template(spec, "pytorch", script)
    replicas: dict[str, Any] = {}
    for role, count in (("Master", 1), ("Worker", num_nodes - 1)):
        if count:  # a role without pods is invalid
            replicas[role] = {"replicas": count, "restartPolicy": "ExitCode", "template": template}
    document = {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": {"name": _NAME},
        "spec": {"pytorchReplicaSpecs": replicas},
    }
    return as_yaml(document, _PYTORCHJOB_COMMENT)


def _node_script(spec: LaunchSpec, rank: str) -> str:
    check_no_addresses(spec, "Kubernetes")
    return node_command(spec, f'"${rank}"', '"$address"') + "\n"


def _pod_template(
    spec: LaunchSpec, container: str, script: str, restart_policy: str = ""
) -> dict[str, Any]:
    """Return the pod of one node."""
    # For `faccel.preemption`, which handles SIGTERM
    pod: dict[str, Any] = {"terminationGracePeriodSeconds": _GRACE_PERIOD_S}
    if restart_policy:
        pod["restartPolicy"] = restart_policy
    address = {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}
    # The ranks of a node share memory, of which a container has 64 MB otherwise.
    memory = {"name": "shm", "emptyDir": {"medium": "Memory"}}
    main: dict[str, Any] = {
        "name": container,
        "image": "IMAGE",
        # Kubernetes replaces `$(NAME)` in a command itself, and `$$` by `$`.
        "command": ["sh", "-c", re.sub(r"\$(?=[$(])", "$$", script)],
        "env": [address],
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],
    }
    resource = _resource(spec)
    if resource:
        main["resources"] = {"limits": {resource: str(spec.nproc)}}
    pod["containers"] = [main]
    pod["volumes"] = [memory]
    return {"spec": pod}


def _resource(spec: LaunchSpec) -> str:
    """Return the resource of the devices, which a pod gets only if it requests them."""
    if not spec.device:
        return _COMMON_RESOURCE
    if spec.device == "cpu":
        return ""
    # imported here, because it imports torch
    from faccel.device_table import KINDS, DeviceKind

    resource = KINDS.get(spec.device, DeviceKind()).kubernetes_resource
    if not resource:
        raise LaunchError(
            "the resource of this device in Kubernetes is unknown",
            got=f"device={spec.device}",
            fix="remove `device`, and replace `nvidia.com/gpu` in the file",
        )
    return resource
