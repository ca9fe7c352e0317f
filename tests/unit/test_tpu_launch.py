"""Launches on TPU pods: what `faccel launch` reads from the environment of a host."""

import subprocess
import sys

import attrs
import pytest
from click.testing import CliRunner

from faccel.cli.commands import main
from faccel.config import Config
from faccel.errors import LaunchError
from faccel.launching.spec import LaunchSpec
from faccel.launching.tpu import is_tpu, within_tpu_pod

SPEC = LaunchSpec(command=("train.py",), nproc=4)
POD = {"TPU_WORKER_HOSTNAMES": "t0,t1,t2"}
UNCHANGED = {
    "no pod": (SPEC, {}),
    "a TPU VM of one host": (SPEC, {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}),
    "an empty variable": (SPEC, {"TPU_WORKER_HOSTNAMES": ""}),
    "a rendezvous of the command line": (
        attrs.evolve(SPEC, nnodes="2", node_rank=1, main_address="head"),
        POD | {"TPU_WORKER_ID": "1"},
    ),
    "an elastic rendezvous": (attrs.evolve(SPEC, rdzv_endpoint="head:1"), POD),
}
HOSTS = {
    "a TPU VM": ({"TPU_WORKER_ID": "2"}, 2),
    "Kubernetes": ({"JOB_COMPLETION_INDEX": "1"}, 1),
    "both": ({"TPU_WORKER_ID": "0", "JOB_COMPLETION_INDEX": "1"}, 0),
}


@pytest.mark.parametrize("name", UNCHANGED)
def test_a_launch_that_is_no_pod_stays_as_it_is(name):
    spec, env = UNCHANGED[name]
    assert within_tpu_pod(spec, env) == spec


@pytest.mark.parametrize("name", HOSTS)
def test_a_host_of_a_pod_is_a_node(name):
    env, node_rank = HOSTS[name]
    expected = attrs.evolve(
        SPEC, nnodes="3", node_rank=node_rank, main_address="t0", main_port=29500
    )
    assert within_tpu_pod(SPEC, POD | env) == expected


@pytest.mark.parametrize("text", [None, "", "3", "-1", "one"])
def test_a_missing_or_invalid_number_of_the_host_is_an_error(text):
    env = POD if text is None else POD | {"TPU_WORKER_ID": text}
    with pytest.raises(LaunchError, match="from 0 to 2"):
        within_tpu_pod(SPEC, env)


@pytest.mark.parametrize(("device", "expected"), [("tpu", True), ("tpu:0", True), ("cpu", False)])
def test_the_device_of_the_configuration_decides(device, expected):
    assert is_tpu(Config(device=device)) is expected


def test_several_processes_on_tpus_without_torch_tpu_are_an_error(tmp_path):
    script = tmp_path / "x.py"
    script.write_text("")
    out = CliRunner().invoke(main, ["launch", "--nproc", "2", "--device", "tpu", str(script)])
    assert (out.exit_code, "`tpu`" in out.output) == (2, True), out.output


def test_the_script_for_a_pod_reads_the_hosts_from_the_metadata(tmp_path):
    """It runs here with commands of the same names in place of the real ones."""
    words = ["--nproc", "4", "--mesh", "dp_shard=-1", "--debug", "-m", "package.train", "--lr", "1"]
    out = CliRunner().invoke(main, ["launch", "--print", "tpu-pod", *words])
    assert out.exit_code == 0, out.output
    commands = {
        "curl": "if [[ $* == *endpoints ]]; then echo a:1:10.0.0.2,b:1:10.0.0.3; else echo 1; fi",
        "faccel": 'echo "$TPU_WORKER_HOSTNAMES $TPU_WORKER_ID $*"',
    }
    for name, text in commands.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    arguments = "launch --nproc 4 --mesh dp_shard=-1 --debug -m package.train --lr 1"
    path = f"{tmp_path}:/usr/bin:/bin"
    for env, expected in (
        ({}, "10.0.0.2,10.0.0.3 1"),
        ({"TPU_WORKER_HOSTNAMES": "t0,t1", "JOB_COMPLETION_INDEX": "0"}, "t0,t1 0"),
    ):
        done = subprocess.run(
            ["bash", "-c", out.output], env={"PATH": path, **env}, capture_output=True, text=True
        )
        assert (done.stdout, done.stderr) == (f"{expected} {arguments}\n", "")


@pytest.mark.parametrize(
    "words", [["--nnodes", "2"], ["--main-address", "h", "--node-rank", "0"]], ids=" ".join
)
def test_the_script_for_a_pod_takes_no_addresses(words):
    out = CliRunner().invoke(main, ["launch", "--print", "tpu-pod", *words, "x.py"])
    assert (out.exit_code, "TPU pod" in out.output) == (2, True), out.output


def test_a_launch_without_tpus_imports_no_torch(tmp_path):
    script = tmp_path / "x.py"
    script.write_text("import sys; print('torch' in sys.modules)")
    command = [sys.executable, "-X", "importtime", "-m", "faccel", "launch", "--nproc", "1"]
    done = subprocess.run([*command, str(script)], capture_output=True, text=True)
    assert done.stdout == "False\n"
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "torch" not in imported
