"""A launch as a value: arguments of torchrun, environment of the ranks, and usage errors."""

import re

import attrs
import pytest
from click.testing import CliRunner

from faccel.cli.commands import main
from faccel.cli.foreign_options import EQUALS
from faccel.cli.launch_command import launch
from faccel.errors import LaunchError
from faccel.launching.spec import LaunchSpec, environment_of, torchrun_arguments
from faccel.mesh import MeshSpec

ARGUMENTS = {
    "one node": (
        {"nproc": 2},
        "--nnodes 1 --nproc-per-node 2 --max-restarts 0 --standalone -- train.py --lr 1",
    ),
    "a fixed port": (
        {"nproc": 2, "main_port": 1234},
        "--nnodes 1 --nproc-per-node 2 --max-restarts 0 --master-addr 127.0.0.1 "
        "--master-port 1234 -- train.py --lr 1",
    ),
    "the second of two nodes": (
        {"nproc": 8, "nnodes": "2", "node_rank": 1, "main_address": "head"},
        "--nnodes 2 --nproc-per-node 8 --max-restarts 0 --node-rank 1 --master-addr head "
        "--master-port 29500 -- train.py --lr 1",
    ),
    "elastic": (
        {"nproc": 4, "nnodes": "1:4", "rdzv_endpoint": "head:29400", "max_restarts": 3},
        "--nnodes 1:4 --nproc-per-node 4 --max-restarts 3 --rdzv-backend c10d "
        "--rdzv-endpoint head:29400 --rdzv-id faccel -- train.py --lr 1",
    ),
    "a module, and logs": (
        {"kind": "module", "nproc": 2, "log_dir": "logs", "tee": True},
        "--nnodes 1 --nproc-per-node 2 --max-restarts 0 --standalone --log-dir logs --tee 3 "
        "--module -- train.py --lr 1",
    ),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_a_spec_determines_the_arguments_of_torchrun(case):
    fields, expected = ARGUMENTS[case]
    spec = LaunchSpec(command=("train.py", "--lr", "1"), **fields)
    assert torchrun_arguments(spec) == expected.split()


@pytest.mark.parametrize("case", ARGUMENTS)
def test_torchrun_parses_the_arguments(case):
    import torch.distributed.run as torchrun

    fields, _ = ARGUMENTS[case]
    spec = LaunchSpec(command=("train.py", "--run-path", "x"), **fields)
    parsed = torchrun.parse_args(torchrun_arguments(spec))
    assert parsed.training_script == "train.py"
    assert parsed.training_script_args == ["--run-path", "x"]
    assert parsed.nproc_per_node == str(fields["nproc"])


def test_a_launch_adds_variables_and_changes_none():
    env = {"FACCEL_SEED": "1", "OMP_NUM_THREADS": "7"}
    spec = LaunchSpec(command=("x.py",), nproc=2, flags={"seed": 2}, config="a.yaml#b")
    added = environment_of(spec, env, 8)
    assert not set(added) & set(env)
    assert added["FACCEL_CONFIG"].endswith("/a.yaml#b")


INVALID = {
    "no rendezvous": {"nnodes": "2"},
    "no node rank": {"nnodes": "2", "main_address": "head"},
    "a range with an address": {"nnodes": "1:4", "main_address": "head", "node_rank": 0},
    "both kinds of rendezvous": {"nnodes": "2", "rdzv_endpoint": "head:1", "node_rank": 0},
    "an unknown kind": {"kind": "notebook"},
}


@pytest.mark.parametrize("case", INVALID)
def test_an_invalid_launch_raises_an_error_with_a_fix(case):
    with pytest.raises(LaunchError) as caught:
        torchrun_arguments(LaunchSpec(command=("x.py",), **INVALID[case]))
    assert caught.value.fix


# A part of the message -> arguments of `faccel launch`. "FILE" is a script without errors.
USAGE = {
    "no such option": ["--nprocs", "2", "x.py"],
    "`--seed`": ["--seed", "x", "x.py"],
    "`bf16`": ["--mixed-precision", "bf61", "x.py"],
    "dp_replicate": ["--mesh", "dp_replicat=2", "x.py"],
    "`--nproc` must be a number": ["--nproc", "many", "x.py"],
    "`--nproc gpu` needs a GPU": ["--nproc", "gpu", "x.py"],
    "no accelerator": ["--nproc", "2", "--device", "cuda", "FILE"],
    "script does not exist": ["--cpu", "x.py"],
    "must be a regular file. Got `/dev/zero`, a device": ["--cpu", "/dev/zero"],
    "must be a regular file. Got `/`, a folder": ["--cpu", "--nproc", "2", "/"],
    "executable does not exist": ["--cpu", "--no-python", "no-such-program"],
    "a module or an executable": ["-m", "--no-python", "x"],
    "`--cpu` contradicts `--device`": ["--cpu", "--device", "cuda", "x.py"],
    "cannot be read": ["--cpu", "--config", "none.yaml", "FILE"],
    "65535": ["--main-port", "99999", "x.py"],
    "--log-dir /proc/none": ["--cpu", "--nproc", "2", "--log-dir", "/proc/none", "FILE"],
    "add `--log-dir DIR`": ["--cpu", "--nproc", "2", "--tee", "FILE"],
    "start 3 processes": ["--cpu", "--nproc", "2", "--mesh", "dp_shard=3", "FILE"],
    "--nnodes 0": ["--cpu", "--nnodes", "0", "FILE"],
    "--nnodes 4:1": ["--cpu", "--nnodes", "4:1", "--rdzv-endpoint", "h:1", "FILE"],
    "use 0 to 1": [
        "--cpu", "--nnodes", "2", "--main-address", "h", "--node-rank", "2", "FILE",
    ],
    "write `--rdzv-endpoint host:29400`": [
        "--cpu", "--nnodes", "2", "--rdzv-endpoint", "h:x", "FILE",
    ],
    "excludes `--main-address`": [
        "--cpu", "--nnodes", "2", "--rdzv-endpoint", "h:1", "--node-rank", "1", "FILE",
    ],
    "add `--rdzv-endpoint HOST:PORT`": [
        "--cpu", "--nnodes", "1:2", "--main-address", "h", "--node-rank", "1", "FILE",
    ],
}  # fmt: skip


def check_usage_error(arguments, message, env=None):
    words = [__file__ if word == "FILE" else word for word in arguments]
    out = CliRunner(env=env).invoke(main, ["launch", *words])
    assert out.exit_code == 2, out.output
    assert out.stdout == ""
    assert message.lower() in out.output.lower(), out.output
    assert "Traceback" not in out.output


@pytest.mark.parametrize("message", USAGE)
def test_wrong_usage_is_one_message_and_exit_code_2(message):
    check_usage_error(USAGE[message], message)


# Options of Accelerate and torchrun, and the option of faccel that the error names.
FOREIGN = {
    "--multi_gpu": "`--nproc auto`",
    "--num_processes": "`--nproc N`",
    "--nproc_per_node": "`--nproc N`",
    "--num_machines": "`--nnodes N`",
    "--main_process_port": "`--main-port P`",
    "--mixed_precision": "`--mixed-precision`",
    "--node_rank": "`--node-rank`",
    "--use_fsdp": "`--mesh dp_shard=-1`",
    "--fsdp_offload_params": "`--mesh dp_shard=-1`",
    "--use_deepspeed": "`--strategy deepspeed --zero 2`",
    "--zero_stage": "`--strategy deepspeed --zero 2`",
    "--config_file": "`faccel config import FILE -o faccel.yaml`",
    "--gradient_accumulation_steps": "`--grad-accum N`",
    "--dynamo_backend": '`faccel.Plan(compile="whole")`',
}


@pytest.mark.parametrize("option", FOREIGN)
def test_an_option_of_another_launcher_names_the_equal_one(option):
    check_usage_error(["--nproc", "2", option, "x", "FILE"], f"use {FOREIGN[option]}")
    check_usage_error([f"{option}=x", "FILE"], f"use {FOREIGN[option]}")


def test_the_options_that_the_errors_name_exist():
    options = {name for param in launch.params for name in (*param.opts, *param.secondary_opts)}
    for text in EQUALS.values():
        if "in the script" not in text and "variable" not in text:
            assert set(re.findall(r"--[a-z-]+", text)) <= options


def test_the_help_lists_the_values_of_mesh_strategy_and_precision():
    text = " ".join(CliRunner().invoke(main, ["launch", "--help"]).output.split())
    for field in attrs.fields(MeshSpec):
        assert field.name in text.partition("--mesh")[2].partition("--strategy")[0]
    assert "deepspeed" in text.partition("--strategy")[2].partition("--zero")[0]
    assert "no, bf16, fp16, fp8" in text


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("FACCEL_SED", "1", "`FACCEL_SEED`"),
        ("FACCEL_SEED", "x", "FACCEL_SEED"),
        ("FACCEL_CONFIG", "none.yaml", "none.yaml"),
    ],
)
def test_a_wrong_environment_is_one_message_and_exit_code_2(name, value, message):
    check_usage_error(["--cpu", "--nproc", "2", "FILE"], message, {name: value})


def test_a_syntax_error_is_reported_once_before_a_process_starts(tmp_path):
    script = tmp_path / "bad.py"
    script.write_text("x = 1\nif x\n")
    check_usage_error(["--cpu", "--nproc", "2", str(script)], "bad.py:2")
