"""The MRPC example reaches the accuracy of one process on two ranks, and from its export."""

import sys

import pytest

from tests.forked_python import faccel_launch
from tests.procs.test_scripts import last_number, run

MODULES = ("datasets", "transformers.models.bert.modeling_bert")  # that the forks have imported


@pytest.mark.slow
def test_two_ranks_reach_the_accuracy_of_one(tmp_path):
    def accuracy(name, *options, launcher=(sys.executable,)):
        out = str(tmp_path / name)
        lines = run("examples/mrpc.py", "--out", out, *options, launcher=launcher)
        # one line per epoch and a last one, each printed once
        assert len(lines) == (2 if "--epochs" in options else 7)
        return last_number(lines, "accuracy")

    one = accuracy("one")
    assert one > 0.9
    ddp = faccel_launch("--nproc", "2", preload=MODULES)
    assert accuracy("ddp", launcher=ddp) > one - 0.03
    export_options = [
        "--model",
        str(tmp_path / "ddp"),
        "--data",
        str(tmp_path / "one" / "offline" / "pairs"),
    ]
    fsdp = faccel_launch("--nproc", "2", "--mesh", "dp_shard=2", preload=MODULES)
    assert (
        accuracy("fsdp", *export_options, "--epochs", "1", "--lr", "1e-5", launcher=fsdp)
        > one - 0.03
    )
