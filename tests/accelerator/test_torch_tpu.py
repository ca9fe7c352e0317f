"""TorchTPU without a chip: what faccel assumes of it, and errors instead of the CPU or an abort.

Set `TORCH_TPU` to a folder into which `pip install --target FOLDER torch-tpu` installed it.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest

FOLDER = os.environ.get("TORCH_TPU", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FOLDER, reason="needs TORCH_TPU=FOLDER with the package torch-tpu"),
]
VM = str(pathlib.Path(__file__).with_name("tpu_vm.py"))
VARIABLES = ("TORCH_TPU_SLICEBUILDER_ADDRESSES", "TORCH_TPU_TOPOLOGY", "TORCH_TPU_XPROF_SESSION_ID")
RUN = "from faccel.__main__ import main; sys.argv = ['faccel', *{words}]; main()"
# One write for the line: the ranks print at the same time.
PRINT = (
    "import json, os, sys\n"
    f"line = json.dumps([os.environ.get(name) for name in {VARIABLES}])\n"
    "os.write(1, (line + chr(10)).encode())\n"
)
TORCHRUN = {
    "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1",
}  # fmt: skip


def on_tpu_vm(code, num_chips=4, **env):
    path = os.pathsep.join([FOLDER, *filter(None, sys.path)])
    return subprocess.run(
        [sys.executable, VM, str(num_chips), f"import os, sys\n{code}"],
        env={**os.environ, "PYTHONPATH": path, "TPU_SKIP_MDS_QUERY": "1", **env},
        capture_output=True,
        text=True,
        timeout=300,
    )


def launch(*words, **env):
    return on_tpu_vm(RUN.format(words=["launch", *words]), **env)


def test_a_launch_sets_what_torch_tpu_sets(tmp_path):
    script = tmp_path / "x.py"
    script.write_text(PRINT)
    done = launch("--nproc", "4", str(script))
    assert done.returncode == 0, done.stderr
    ranks = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(ranks) == 4 and ranks == [ranks[0]] * 4
    direct = on_tpu_vm(f"torch.tpu.distributed.set_tpu_launch_env(nproc_per_node=4)\n{PRINT}")
    expected = json.loads(direct.stdout.splitlines()[-1])
    (addresses, topology, session), (other_addresses, other_topology, _) = ranks[0], expected
    assert topology == other_topology == "2,2,1"
    assert int(session) > 0
    for text in (addresses, other_addresses):
        hosts, ports = zip(*(address.split(":") for address in text.split(",")), strict=True)
        assert set(hosts) == {"localhost"} and len(set(ports)) == 4


def test_a_number_of_processes_that_the_chips_do_not_allow_is_an_error(tmp_path):
    script = tmp_path / "x.py"
    script.write_text(PRINT)
    done = launch("--nproc", "3", str(script))
    assert done.returncode == 2, done.stderr
    assert "cannot run 3 processes" in done.stderr and "1, 2, 4 or 8" in done.stderr


def test_hosts_of_a_pod_have_one_list_of_addresses(tmp_path):
    code = (
        "from faccel.launching.spec import LaunchSpec\n"
        "from faccel.launching.tpu import prepare_tpus, within_tpu_pod\n"
        "prepare_tpus(within_tpu_pod(LaunchSpec(command=('x.py',), nproc=4), os.environ))\n"
        "print(os.environ['TORCH_TPU_SLICEBUILDER_ADDRESSES'], os.environ['NODE_RANK'])"
    )
    hosts = {"TPU_WORKER_HOSTNAMES": "t0,t1"}
    expected = ",".join(f"{host}:{8070 + i}" for host in ("t0", "t1") for i in range(4))
    for rank in ("0", "1"):
        done = on_tpu_vm(code, **hosts, TPU_WORKER_ID=rank)
        assert done.stdout.splitlines()[-1] == f"{expected} {rank}", done.stderr


@pytest.mark.parametrize(
    ("num_chips", "device", "env", "message"),
    [
        (0, None, {}, "no `tpu` device on this node"),
        (0, "tpu", {}, "no `tpu`"),
        (4, None, {}, "the device `tpu:0` cannot be used"),
        (4, "tpu:1", {}, "a process sees one `tpu` device"),
        (4, None, TORCHRUN, "TORCH_TPU_SLICEBUILDER_ADDRESSES"),
    ],
)
def test_no_chip_is_an_error_and_neither_the_cpu_nor_an_abort(num_chips, device, env, message):
    code = f"import faccel; print('on', faccel.init(device={device!r}).device)"
    done = on_tpu_vm(code, num_chips, **env)
    assert (done.returncode, "on " in done.stdout) == (1, False), done.stderr
    assert message in done.stderr and "tpu" in message.lower()


def test_the_cpu_is_used_where_it_is_named():
    done = on_tpu_vm("import faccel; print('on', faccel.init(device='cpu').device)", 0)
    assert "on cpu" in done.stdout, done.stderr


def test_the_names_that_faccel_uses_are_there_and_warn_of_nothing():
    code = (
        "import warnings\n"
        "from faccel.device_table import KINDS, computes_bf16, is_initialized, library_versions\n"
        "from faccel.runtime.devices import c10d_backend\n"
        "warnings.simplefilter('error')\n"
        "device = torch.device('tpu', 0)\n"
        "print(c10d_backend(device), is_initialized('tpu'), computes_bf16('tpu'))\n"
        "kernel = 'aten::_amp_foreach_non_finite_check_and_unscale_'\n"
        "key = 'PrivateUse1'\n"
        "has = torch._C._dispatch_has_kernel_for_dispatch_key(kernel, key)\n"
        "print(has, list(library_versions('tpu')))"
    )
    done = on_tpu_vm(code)
    expected = ["cpu:gloo,tpu:tpu_dist False True", "False ['torch-tpu']"]
    assert done.stdout.splitlines()[-2:] == expected, done.stderr
