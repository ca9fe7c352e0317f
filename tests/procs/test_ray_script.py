"""`faccel launch --print ray` on a local Ray cluster of two nodes: `pip install ray` (200 MB)."""

import os
import subprocess
import sys

import pytest

from tests.command_line import run_command

pytest.importorskip("ray")
pytestmark = pytest.mark.slow

TRAINING = """
import os, sys
import faccel

with faccel.init() as ctx:
    place = f"rank {ctx.rank} of {ctx.world_size} on node {ctx.node_rank}"
    attempt = os.path.join(sys.argv[1], str(ctx.rank))
    is_first = not os.path.exists(attempt)
    with open(attempt, "a") as file:
        file.write(f"{place}: {sys.argv[2]}\\n")
    faccel.barrier(ctx)
sys.exit(75 if is_first else 0)  # as after a preemption with a saved checkpoint
"""
# In another process, because a cluster changes the handlers of signals.
CLUSTER = """
import os, subprocess, sys
from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
cluster.add_node(num_cpus=1)
os.environ["RAY_ADDRESS"] = cluster.address
code = subprocess.run([sys.executable, sys.argv[1]]).returncode
cluster.shutdown()
sys.exit(code)
"""


def test_the_script_runs_on_two_nodes_and_starts_them_again_after_a_preemption(tmp_path):
    script, job = tmp_path / "train.py", tmp_path / "job.py"
    script.write_text(TRAINING)
    words = ["--cpu", "--nproc", "1", "--nnodes", "2", str(script), str(tmp_path), "a b"]
    code, text, errors = run_command("launch", "--print", "ray", *words)
    assert (code, errors) == (0, "")
    job.write_text(text)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", CLUSTER, str(job)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        assert (tmp_path / str(rank)).read_text() == f"rank {rank} of 2 on node {rank}: a b\n" * 2
