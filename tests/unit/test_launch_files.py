"""Files for Kubernetes, SkyPilot and Ray: their content, their schemas, and what their scripts do.

Their shell scripts run here, with a program named `faccel` that prints its words.
"""

import ast
import os
import signal
import subprocess

import pytest
import yaml
from click.testing import CliRunner

from faccel.checkpoint.preemption import Preemption
from faccel.cli.commands import main
from faccel.cli.launch_command import launch
from faccel.launching.node_command import SAVED
from faccel.launching.render import RENDERINGS

ONE = ["--cpu", "--nproc", "2", "--seed", "3", "train.py", "--name", "a b"]
TWO = ["--nproc", "8", "--nnodes", "2", "--mixed-precision", "bf16", "--config", "CONFIG"]
TWO += ["--max-restarts", "3", "--main-port", "29501", "--join-timeout", "90", "-m", "pack.train"]
ONE_COMMAND = "faccel launch --nproc 2 --seed 3 --device cpu train.py --name 'a b'"
# The words of both nodes, and the options that follow them
NODE = "launch --nproc 8 --nnodes 2 --node-rank {rank} --main-address {address} --config CONFIG"
TAIL = "--main-port 29501 --max-restarts 3 --join-timeout 90 --mixed-precision bf16 -m pack.train"


@pytest.fixture
def printed(tmp_path):
    """Returns a function that returns what `faccel launch --print` prints."""
    config = tmp_path / "training.yaml"
    config.write_text("seed: 1\n")

    def run(target, words):
        words = [str(config) if word == "CONFIG" else word for word in words]
        out = CliRunner().invoke(main, ["launch", "--print", target, *words])
        assert out.exit_code == 0, out.output
        return out.output.replace(str(config), "CONFIG")

    return run


@pytest.fixture
def run_script(tmp_path):
    """Returns a function that runs a shell script, with `faccel` replaced by other commands."""

    def run(script, env, faccel='echo "$@"'):
        program = tmp_path / "faccel"
        program.write_text(f"#!/bin/bash\n{faccel}\n")
        program.chmod(0o755)
        env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", **env}
        return subprocess.Popen(
            ["sh", "-c", script], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    return run


def output_of(process):
    out, errors = process.communicate()
    assert (process.returncode, errors) == (0, "")
    return out.rstrip("\n")


def containers(document):
    """Return the containers of all pods of a document."""
    spec = document["spec"]
    if document["kind"] == "JobSet":
        pods = [job["template"]["spec"]["template"] for job in spec["replicatedJobs"]]
    else:
        pods = [replica["template"] for replica in spec["pytorchReplicaSpecs"].values()]
    return [pod["spec"]["containers"][0] for pod in pods]


def test_the_choices_of_print_are_the_rows_of_the_table_and_75_is_the_code_of_a_preemption():
    (option,) = [param for param in launch.params if param.name == "rendering"]
    assert [*option.type.choices] == sorted(RENDERINGS)
    assert Preemption.exit_code == SAVED == 75


def pod(container, gpus, restart):
    limits = {"resources": {"limits": {"nvidia.com/gpu": gpus}}} if gpus else {}
    ip = {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}
    main = {
        "name": container,
        "image": "IMAGE",
        "env": [ip],
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],
        **limits,
    }
    return {
        "terminationGracePeriodSeconds": 120,
        **restart,
        "containers": [main],
        "volumes": [{"name": "shm", "emptyDir": {"medium": "Memory"}}],
    }


@pytest.mark.parametrize(("words", "num_nodes", "gpus"), [(ONE, 1, None), (TWO, 2, "8")])
def test_a_jobset_starts_again_for_exit_code_75_only(printed, words, num_nodes, gpus):
    document = yaml.safe_load(printed("k8s", words))
    (container,) = containers(document)
    assert container.pop("command")[:2] == ["sh", "-c"]
    exit_codes = {"containerName": "faccel", "operator": "In", "values": [75]}
    job = {
        "parallelism": num_nodes,
        "completions": num_nodes,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": exit_codes}]},
        "template": {"spec": pod("faccel", gpus, {"restartPolicy": "Never"})},
    }
    rule = {
        "name": "preempted",
        "action": "RestartJobSetAndIgnoreMaxRestarts",
        "onJobFailureReasons": ["PodFailurePolicy"],
    }
    assert document == {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": "faccel"},
        "spec": {
            "failurePolicy": {"maxRestarts": 0, "rules": [rule]},
            "replicatedJobs": [{"name": "node", "replicas": 1, "template": {"spec": job}}],
        },
    }


@pytest.mark.parametrize(("words", "num_nodes", "gpus"), [(ONE, 1, None), (TWO, 2, "8")])
def test_a_pytorchjob_restarts_pods_by_exit_code(printed, words, num_nodes, gpus):
    document = yaml.safe_load(printed("k8s-pytorchjob", words))
    for container in containers(document):
        assert container.pop("command")[:2] == ["sh", "-c"]
    # The operator looks for the name `pytorch`.
    template = {"spec": pod("pytorch", gpus, {})}
    replica = {"replicas": 1, "restartPolicy": "ExitCode", "template": template}
    roles = {"Master": replica, "Worker": replica} if num_nodes == 2 else {"Master": replica}
    assert document == {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": {"name": "faccel"},
        "spec": {"pytorchReplicaSpecs": roles},
    }


@pytest.mark.parametrize(
    ("words", "num_nodes", "devices"),
    [(ONE, 1, {"cpus": "2+"}), (TWO, 2, {"accelerators": "GPU:8"})],
)
def test_a_task_of_skypilot_recovers_for_exit_code_75_only(printed, words, num_nodes, devices):
    document = yaml.safe_load(printed("sky", words))
    assert document.pop("run")
    assert document == {
        "name": "faccel",
        "num_nodes": num_nodes,
        "workdir": ".",
        "resources": {**devices, "job_recovery": {"recover_on_exit_codes": [75]}},
    }


def script_of(target, text):
    document = yaml.safe_load(text)
    if target == "sky":
        return document["run"]
    return containers(document)[-1]["command"][2]


SHELL = ("k8s", "k8s-pytorchjob", "sky")
# The variables that each project sets on two nodes, and the address of node 0 on each node.
ENVIRONMENTS = {
    "k8s": (
        [{"JOB_COMPLETION_INDEX": str(rank), "POD_IP": f"10.0.0.{rank}"} for rank in range(2)],
        ["10.0.0.0", "faccel-node-0-0.faccel"],
    ),
    "k8s-pytorchjob": (
        [
            {"RANK": str(rank), "WORLD_SIZE": "2", "POD_IP": f"10.0.0.{rank}", "MASTER_PORT": "1"}
            for rank in range(2)
        ],
        ["10.0.0.0", "faccel-master-0"],
    ),
    "sky": (
        [
            {"SKYPILOT_NODE_RANK": str(rank), "SKYPILOT_NODE_IPS": "10.1.0.0\n10.1.0.1"}
            for rank in range(2)
        ],
        ["10.1.0.0", "10.1.0.0"],
    ),
}


@pytest.mark.parametrize("target", SHELL)
def test_each_node_starts_its_ranks(target, printed, run_script):
    script = script_of(target, printed(target, TWO))
    environments, addresses = ENVIRONMENTS[target]
    for rank, (env, address) in enumerate(zip(environments, addresses, strict=True)):
        expected = f"{NODE.format(rank=rank, address=address)} {TAIL}"
        assert output_of(run_script(script, env)) == expected
    script = script_of(target, printed(target, ONE))
    assert ONE_COMMAND in script
    assert output_of(run_script(script, environments[0], 'printf "%s|" "$@"')) == (
        "launch|--nproc|2|--seed|3|--device|cpu|train.py|--name|a b|"
    )


def test_the_ranks_of_a_pytorchjob_do_not_get_the_variables_of_its_pods(printed, run_script):
    script = script_of("k8s-pytorchjob", printed("k8s-pytorchjob", ONE))
    env = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "faccel-master-0", "MASTER_PORT": "1"}
    process = run_script(script, env, "env | grep -cE '^(RANK|WORLD_SIZE|MASTER_)'; exit 0")
    assert output_of(process) == "0"


# The exit code of the ranks -> that of the script. Kubeflow restarts codes from 128 on.
CODES = {
    "k8s": {0: 0, 1: 1, 75: 75, 137: 137},
    "k8s-pytorchjob": {0: 0, 1: 1, 7: 7, 75: 138, 127: 127, 137: 1, 143: 1},
    "sky": {0: 0, 1: 1, 75: 75, 137: 137},
}


@pytest.mark.parametrize("target", SHELL)
def test_the_exit_code_is_the_one_that_the_project_restarts_for(target, printed, run_script):
    script = script_of(target, printed(target, ONE))
    for code, expected in CODES[target].items():
        process = run_script(script, {"RANK": "0"}, f"exit {code}")
        process.communicate()
        assert process.returncode == expected


@pytest.mark.parametrize(("target", "code"), [("k8s", 75), ("k8s-pytorchjob", 138)])
def test_a_signal_to_the_container_reaches_the_ranks_which_save(target, code, printed, run_script):
    script = script_of(target, printed(target, ONE))
    saving = (
        "trap 'requested=1' TERM; echo ready; until [ -n \"$requested\" ]; do read -t 0.05 -u 9"
    )
    process = run_script(script, {"RANK": "0"}, f"exec 9<> <(:); {saving}; done; exit 75")
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == code


def test_kubernetes_leaves_the_arguments_of_the_script_unchanged(printed):
    """It replaces `$(NAME)` by a variable, and `$$` by `$`."""
    script = script_of("k8s", printed("k8s", ["--cpu", "x.py", "$(POD_IP)", "a$$b", "$$(x)", "$y"]))
    assert "'$$(POD_IP)' 'a$$$b' '$$$$(x)' '$y'" in script


def test_the_script_for_ray_has_the_launch_as_constants(printed):
    tree = ast.parse(printed("ray", TWO))
    constants = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and node.targets[0].id.isupper():
            constants[node.targets[0].id] = ast.literal_eval(node.value)
    assert constants == {
        "NUM_NODES": 2,
        "NUM_PROCESSES": 8,
        "RESOURCES": {"CPU": 8, "GPU": 8},
        "OPTIONS": ["--config", "CONFIG", *TAIL.split()],
        "SAVED": 75,
    }
    assert "RESOURCES = {'CPU': 2}  # of a node" in printed("ray", ONE)


REFUSED = {
    "--nnodes 2 --node-rank 0 --main-address h": "numbers the nodes and sets their addresses",
    "--rdzv-endpoint h:1": "numbers the nodes and sets their addresses",
    "--nnodes 1:4 --rdzv-endpoint h:1": "a fixed number of nodes",
}


@pytest.mark.parametrize("target", [*SHELL, "ray"])
@pytest.mark.parametrize("options", REFUSED)
def test_what_the_project_decides_itself_is_an_error(target, options):
    words = ["launch", "--print", target, "--cpu", *options.split(), "x.py"]
    out = CliRunner().invoke(main, words)
    assert (out.exit_code, out.stdout) == (2, "")
    assert REFUSED[options] in out.output


def test_kubernetes_needs_the_resource_of_a_device(printed):
    document = yaml.safe_load(printed("k8s", ["--nproc", "1", "--device", "cuda", "x.py"]))
    (container,) = containers(document)
    assert container["resources"] == {"limits": {"nvidia.com/gpu": "1"}}
    words = ["launch", "--print", "k8s", "--nproc", "1", "--device", "xpu", "x.py"]
    out = CliRunner().invoke(main, words)
    assert (out.exit_code, "replace `nvidia.com/gpu` in the file" in out.output) == (2, True)


@pytest.mark.parametrize("target", ["slurm", "mpirun"])
def test_a_binding_that_another_launcher_does_not_have_is_an_error(target):
    words = ["launch", "--print", target, "--cpu", "--numa-binding", "node", "x.py"]
    out = CliRunner().invoke(main, words)
    assert (out.exit_code, "no equivalent of `--numa-binding`" in out.output) == (2, True)


@pytest.mark.slow  # the models of the schema take a second to import
@pytest.mark.parametrize("words", [ONE, TWO], ids=["one", "two"])
def test_the_files_for_kubernetes_match_the_schemas_of_their_projects(printed, words):
    pytest.importorskip("kubeflow_trainer_api")
    from kubeflow_trainer_api.models.io_k8s_api_core_v1_pod_template_spec import (
        IoK8sApiCoreV1PodTemplateSpec,
    )
    from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

    jobset = yaml.safe_load(printed("k8s", words))
    # Unknown keys are dropped.
    assert JobsetV1alpha2JobSet.from_dict(jobset).to_dict() == jobset
    job = yaml.safe_load(printed("k8s-pytorchjob", words))
    for replica in job["spec"]["pytorchReplicaSpecs"].values():
        template = replica["template"]
        assert IoK8sApiCoreV1PodTemplateSpec.from_dict(template).to_dict() == template


@pytest.mark.slow
@pytest.mark.parametrize("words", [ONE, TWO], ids=["one", "two"])
def test_a_pytorchjob_matches_the_models_of_kubeflow(printed, words):
    """Packages of 60 MB, which CI does not install: `pip install kubeflow-training`."""
    models = pytest.importorskip("kubeflow.training.models")
    job = yaml.safe_load(printed("k8s-pytorchjob", words))
    keys = {*models.KubeflowOrgV1PyTorchJob.attribute_map.values()}
    spec_keys = {*models.KubeflowOrgV1PyTorchJobSpec.attribute_map.values()}
    replica_keys = {*models.KubeflowOrgV1ReplicaSpec.attribute_map.values()}
    assert keys >= {*job}
    assert spec_keys >= {*job["spec"]}
    for replica in job["spec"]["pytorchReplicaSpecs"].values():
        assert replica_keys >= {*replica}


@pytest.mark.slow
@pytest.mark.parametrize("words", [ONE, TWO], ids=["one", "two"])
def test_a_task_matches_the_schema_of_skypilot(printed, words):
    """SkyPilot limits the version of click, so CI does not install it: `pip install skypilot`."""
    schemas = pytest.importorskip("sky.utils.schemas")
    jsonschema = pytest.importorskip("jsonschema")
    task = yaml.safe_load(printed("sky", words))
    jsonschema.validate(task, schemas.get_task_schema())
    jsonschema.validate(task["resources"], schemas.get_resources_schema())


# What requests devices in the file of each launcher.
REQUESTS = {
    "slurm": "--gpus-per-node",
    "k8s": "nvidia.com/gpu",
    "k8s-pytorchjob": "nvidia.com/gpu",
    "sky": "accelerators",
    "ray": "'GPU'",
}


@pytest.mark.parametrize("target", REQUESTS)
def test_the_device_of_flags_and_file_decides_whether_devices_are_requested(
    target, tmp_path, monkeypatch
):
    (tmp_path / "cpu.yaml").write_text("device: cpu\n")
    file = ["--config", str(tmp_path / "cpu.yaml")]

    def requests(*words):
        out = CliRunner().invoke(
            main, ["launch", "--print", target, "--nproc", "2", *words, "x.py"]
        )
        assert out.exit_code == 0, out.output
        return REQUESTS[target] in out.output

    assert requests()
    assert not requests("--cpu")
    assert not requests("--device", "cpu")
    assert not requests(*file)
    # The other nodes do not have the variables of this one.
    monkeypatch.setenv("FACCEL_DEVICE", "cpu")
    assert requests()
