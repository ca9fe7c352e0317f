"""A launch as values: arguments of torchrun, the environment of the ranks, and what cannot be."""

import pytest
from click.testing import CliRunner

from faccel.cli.commands import main
from faccel.errors import LaunchError
from faccel.launching.spec import LaunchSpec, additions, arguments

ARGUMENTS = {
    "one machine": (
        {"nproc": 2},
        "--nnodes 1 --nproc-per-node 2 --max-restarts 0 --standalone -- train.py --lr 1",
    ),
    "its own port": (
        {"nproc": 2, "main_port": 1234},
        "--nnodes 1 --nproc-per-node 2 --max-restarts 0 --master-addr 127.0.0.1 --master-port 1234 -- train.py --lr 1",
    ),
    "the second of two machines": (
        {"nproc": 8, "nnodes": "2", "node_rank": 1, "main_address": "head"},
        "--nnodes 2 --nproc-per-node 8 --max-restarts 0 --node-rank 1 --master-addr head --master-port 29500 "
        "-- train.py --lr 1",
    ),
    "elastic": (
        {"nproc": 4, "nnodes": "1:4", "rdzv_endpoint": "head:29400", "max_restarts": 3},
        "--nnodes 1:4 --nproc-per-node 4 --max-restarts 3 --rdzv-backend c10d --rdzv-endpoint head:29400 "
        "--rdzv-id faccel -- train.py --lr 1",
    ),
    "a module, and logs": (
        {"kind": "module", "nproc": 2, "log_dir": "logs", "tee": True},
        "--nnodes 1 --nproc-per-node 2 --max-restarts 0 --standalone --log-dir logs --tee 3 --module "
        "-- train.py --lr 1",
    ),
}


@pytest.mark.parametrize("what", ARGUMENTS)
def test_arguments_follow_from_what_was_asked(what):
    fields, expected = ARGUMENTS[what]
    assert arguments(LaunchSpec(command=("train.py", "--lr", "1"), **fields)) == expected.split()


@pytest.mark.parametrize("what", ARGUMENTS)
def test_torchrun_understands_them(what):
    import torch.distributed.run as torchrun

    fields, _ = ARGUMENTS[what]
    given = torchrun.parse_args(
        arguments(LaunchSpec(command=("train.py", "--run-path", "x"), **fields))
    )
    assert (given.training_script, given.training_script_args) == ("train.py", ["--run-path", "x"])
    assert given.nproc_per_node == str(fields["nproc"])


def test_the_environment_is_added_to_and_nothing_in_it_changed(tmp_path):
    env = {"FACCEL_SEED": "1", "OMP_NUM_THREADS": "7"}
    spec = LaunchSpec(command=("x.py",), nproc=2, flags={"seed": 2}, config="a.yaml#b")
    more = additions(spec, env, 8)
    assert not set(more) & set(env)
    assert more["FACCEL_CONFIG"].endswith("/a.yaml#b")


def test_what_cannot_be_is_said_with_the_fix():
    for fields in (
        {"nnodes": "2"},
        {"nnodes": "2", "main_address": "head"},
        {"nnodes": "1:4", "main_address": "head", "node_rank": 0},
        {"nnodes": "2", "rdzv_endpoint": "head:1", "node_rank": 0},
    ):
        with pytest.raises(LaunchError) as caught:
            arguments(LaunchSpec(command=("x.py",), **fields))
        assert caught.value.fix


USAGE = {
    "no such option": ["--nprocs", "2", "x.py"],
    "`--seed`": ["--seed", "x", "x.py"],
    "`bf16`": ["--mixed-precision", "bf61", "x.py"],
    "dp_replicate": ["--mesh", "dp_replicat=2", "x.py"],
    "`--nproc` is a number": ["--nproc", "many", "x.py"],
    "no GPU": ["--nproc", "gpu", "x.py"],
    "script is not there": ["--cpu", "x.py"],
    "program is not there": ["--cpu", "--no-python", "no-such-program"],
    "module or a program": ["-m", "--no-python", "x"],
    "`--cpu` is `--device cpu`": ["--cpu", "--device", "cuda", "x.py"],
    "cannot be read": ["--config", "no.yaml", "x.py"],
    "65535": ["--main-port", "99999", "x.py"],
}


@pytest.mark.parametrize("what", USAGE)
def test_wrong_usage_is_one_message_and_exit_code_2(what):
    out = CliRunner().invoke(main, ["launch", *USAGE[what]])
    assert out.exit_code == 2
    assert what.lower() in out.output.lower(), out.output
    assert "Traceback" not in out.output
