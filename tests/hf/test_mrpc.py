"""The example of sentence pairs, as it is started: as accurate on two ranks as on one, and from what it exported."""

import sys

import pytest

from tests.procs.test_scripts import last_number, start

LAUNCH = [sys.executable, "-m", "faccel", "launch", "--cpu", "--nproc", "2"]


@pytest.mark.slow
def test_two_ranks_reach_the_accuracy_of_one(tmp_path):
    def accuracy(name, *more, launcher=None):
        lines = start(
            "examples/mrpc.py", 0, launcher=launcher, more=["--out", str(tmp_path / name), *more]
        )
        assert len(lines) == (
            2 if "--epochs" in more else 7
        )  # a line an epoch and the last one, once
        return last_number(lines, "accuracy")

    one = accuracy("one")
    assert one > 0.88
    assert accuracy("ddp", launcher=LAUNCH) > one - 0.03
    named = [
        "--model",
        str(tmp_path / "ddp"),
        "--data",
        str(tmp_path / "one" / "offline" / "pairs"),
    ]
    shared = [*LAUNCH, "--mesh", "dp_shard=2"]  # what was exported loads by its name
    assert accuracy("fsdp", *named, "--epochs", "1", "--lr", "1e-5", launcher=shared) > one - 0.03
