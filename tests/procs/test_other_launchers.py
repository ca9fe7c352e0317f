"""Commands of `accelerate launch` and `torchrun` start what they name.

Each command is started as it is, with `faccel launch` for the name of the launcher. Its script
prints what each rank got, and trains nothing. `{cwd}` is the folder of the script.
"""

import json
import os
import socket

import pytest

from faccel import Plan
from faccel.backends.table import BACKENDS
from faccel.parallel import Compile, DeepSpeedConfig, FsdpConfig
from tests.command_line import Command

pytestmark = pytest.mark.slow

PROBE = """
import json, os, sys
import faccel

with faccel.init() as ctx:
    config, words = ctx.config, sys.argv[1:]
    mesh = {}
    for axis in ("dp_replicate", "dp_shard", "cp", "tp", "pp", "ep"):
        size = getattr(ctx.mesh.spec, axis)
        if size > 1:
            mesh[axis] = size
    report = {
        "rank": ctx.rank,
        "world_size": ctx.world_size,
        "node": [ctx.node_rank, ctx.num_nodes],
        "device": ctx.device.type,
        "precision": config.mixed_precision,
        "grad_accum": config.grad_accum,
        "mesh": mesh,
        "strategy": config.strategy,
        "zero": config.zero,
        "plan": repr(config.plan),
        "debug": config.debug,
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "gpus": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "args": words,
    }
    if "--wrap" in words:
        import torch

        class Block(torch.nn.Sequential):
            pass

        model = faccel.wrap(torch.nn.Sequential(Block(torch.nn.Linear(2, 2))), ctx)
        report["parameters"] = sorted({type(param).__name__ for param in model.parameters()})
    # One write, because the lines of ranks must not mix.
    sys.stdout.write(json.dumps(report) + "\\n")
    sys.stdout.flush()
"""
# What a rank reports if the command asks for nothing.
ONE = {
    "world_size": 1,
    "node": [0, 1],
    "device": "cpu",
    "precision": "no",
    "grad_accum": 1,
    "mesh": {},
    "strategy": None,
    "zero": None,
    "plan": "None",
    "debug": False,
    "threads": "1",
    "gpus": "",
    "args": [],
}
TWO = {"world_size": 2, "mesh": {"dp_replicate": 2}}
SHARDED = {"world_size": 2, "mesh": {"dp_shard": 2}}

FILES = {
    "single.yaml": """
compute_environment: LOCAL_MACHINE
debug: true
distributed_type: 'NO'
downcast_bf16: 'no'
enable_cpu_affinity: false
gpu_ids: all
machine_rank: 0
main_training_function: main
mixed_precision: bf16
num_machines: 1
num_processes: 1
rdzv_backend: static
same_network: true
tpu_env: []
tpu_use_cluster: false
tpu_use_sudo: false
use_cpu: true
""",
    "multi_cpu.yaml": """
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_CPU
machine_rank: 0
main_process_ip: null
main_process_port: null
mixed_precision: 'no'
num_machines: 1
num_processes: 2
use_cpu: true
""",
    "multi_gpu.yaml": """
compute_environment: LOCAL_MACHINE
deepspeed_config: {}
distributed_type: MULTI_GPU
fp16: true
fsdp_config: {}
machine_rank: 0
main_process_ip: null
main_process_port: null
main_training_function: main
num_machines: 1
num_processes: 8
use_cpu: false
""",
    "fsdp.yaml": """
compute_environment: LOCAL_MACHINE
debug: false
distributed_type: FSDP
downcast_bf16: 'no'
enable_cpu_affinity: false
fsdp_config:
  fsdp_activation_checkpointing: false
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_backward_prefetch: BACKWARD_PRE
  fsdp_cpu_ram_efficient_loading: true
  fsdp_forward_prefetch: false
  fsdp_offload_params: false
  fsdp_sharding_strategy: FULL_SHARD
  fsdp_state_dict_type: SHARDED_STATE_DICT
  fsdp_sync_module_states: true
  fsdp_transformer_layer_cls_to_wrap: Block
  fsdp_use_orig_params: true
machine_rank: 0
main_training_function: main
mixed_precision: bf16
num_machines: 1
num_processes: 8
rdzv_backend: static
same_network: true
use_cpu: false
""",
    "fsdp2.yaml": """
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
fsdp_config:
  fsdp_activation_checkpointing: true
  fsdp_auto_wrap_policy: SIZE_BASED_WRAP
  fsdp_cpu_ram_efficient_loading: true
  fsdp_min_num_params: 1000
  fsdp_offload_params: true
  fsdp_reshard_after_forward: false
  fsdp_state_dict_type: FULL_STATE_DICT
  fsdp_version: 2
num_machines: 1
num_processes: 1
use_cpu: true
""",
    "zero2.yaml": """
compute_environment: LOCAL_MACHINE
deepspeed_config:
  gradient_accumulation_steps: 4
  gradient_clipping: 1.0
  offload_optimizer_device: none
  offload_param_device: none
  zero3_init_flag: false
  zero_stage: 2
distributed_type: DEEPSPEED
mixed_precision: bf16
num_machines: 1
num_processes: 1
use_cpu: true
""",
    "zero3.yaml": """
compute_environment: LOCAL_MACHINE
deepspeed_config:
  deepspeed_config_file: {cwd}/ds.json
  deepspeed_multinode_launcher: standard
  zero3_init_flag: true
distributed_type: DEEPSPEED
num_machines: 1
num_processes: 1
use_cpu: true
""",
    "ds.json": '{"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1}',
    "nodes.yaml": """
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_CPU
machine_rank: 0
main_process_ip: 127.0.0.1
main_process_port: {port}
num_machines: 2
num_processes: 2
rdzv_backend: static
same_network: true
use_cpu: true
""",
    "dynamo.yaml": """
compute_environment: LOCAL_MACHINE
distributed_type: 'NO'
dynamo_config:
  dynamo_backend: INDUCTOR
  dynamo_mode: default
  dynamo_use_dynamic: false
  dynamo_use_fullgraph: false
  dynamo_use_regional_compilation: true
num_machines: 1
num_processes: 1
use_cpu: true
""",
    "parallel.yaml": """
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_GPU
num_machines: 1
num_processes: 2
parallelism_config:
  parallelism_config_cp_size: 1
  parallelism_config_dp_replicate_size: 1
  parallelism_config_dp_shard_size: 1
  parallelism_config_tp_size: 2
""",
    "sagemaker.yaml": """
compute_environment: AMAZON_SAGEMAKER
distributed_type: 'NO'
ec2_instance_type: ml.p3.2xlarge
""",
}
# The words of a command, and what differs from `ONE` on its ranks.
COMMANDS = {
    # Accelerate: one process, several, and their options
    "--cpu --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no "
    "{cwd}/train.py": {},
    "--use_cpu --quiet --same_network --mixed-precision=bf16 {cwd}/train.py": {
        "precision": "bf16"
    },
    "--cpu --num_processes=2 {cwd}/train.py --wrap": {
        **TWO, "args": ["--wrap"], "parameters": ["Parameter"],
    },
    "--multi_gpu --cpu --num_processes 2 --mixed_precision bf16 --main_process_port 0 "
    "{cwd}/train.py --lr 1e-3": {**TWO, "precision": "bf16", "args": ["--lr", "1e-3"]},
    "--cpu --num_processes 2 --main_process_port {port} --max_restarts 1 {cwd}/train.py": TWO,
    "--cpu {cwd}/train.py --num_processes 3 --mixed_precision fp16 --config_file x -m": {
        "args": ["--num_processes", "3", "--mixed_precision", "fp16", "--config_file", "x", "-m"]
    },
    "--cpu -m package.train --lr 1": {"args": ["--lr", "1"]},
    "--cpu --debug --gpu_ids 0 --num_cpu_threads_per_process=3 --module package.train": {
        "debug": True, "gpus": "0", "threads": "3",
    },
    "--cpu --num_processes 1 --no_python python {cwd}/train.py a": {"args": ["a"]},
    "--cpu --gradient_accumulation_steps 8 {cwd}/train.py": {"grad_accum": 8},
    # its files, and options that are stronger
    "--config_file {cwd}/single.yaml {cwd}/train.py": {"precision": "bf16", "debug": True},
    "--config_file={cwd}/multi_cpu.yaml {cwd}/train.py": TWO,
    "--config_file {cwd}/multi_gpu.yaml --cpu --num_processes 2 --mixed_precision no "
    "{cwd}/train.py": TWO,
    "--config_file {cwd}/parallel.yaml --cpu {cwd}/train.py": {
        "world_size": 2, "mesh": {"tp": 2},
    },
    # FSDP
    "--config_file {cwd}/fsdp.yaml --cpu --num_processes 2 {cwd}/train.py --wrap": {
        **SHARDED,
        "precision": "bf16",
        "plan": repr(Plan(units="Block")),
        "args": ["--wrap"],
        "parameters": ["DTensor"],
    },
    "--config_file {cwd}/fsdp2.yaml {cwd}/train.py": {
        "plan": repr(
            Plan(
                units=1000,
                offload=True,
                activation_checkpoint="full",
                fsdp=FsdpConfig(reshard_after_forward=False),
            )
        )
    },
    "--use_fsdp --cpu --num_processes 2 --fsdp_sharding_strategy SHARD_GRAD_OP "
    "--fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP "
    "--fsdp_transformer_layer_cls_to_wrap=Block,Head {cwd}/train.py": {
        **SHARDED,
        "plan": repr(
            Plan(units=("Block", "Head"), fsdp=FsdpConfig(reshard_after_forward=False))
        ),
    },
    # compilation
    "--cpu --dynamo_backend inductor {cwd}/train.py": {"plan": repr(Plan(compile="whole"))},
    "--cpu --dynamo_backend=eager --dynamo_mode default --dynamo_use_fullgraph {cwd}/train.py": {
        "plan": repr(Plan(compile=Compile(backend="eager", fullgraph=True)))
    },
    "--config_file {cwd}/dynamo.yaml {cwd}/train.py": {"plan": repr(Plan(compile="units"))},
    # torchrun, `python -m torch.distributed.run` and `torch.distributed.launch`
    "--standalone --nproc_per_node=2 --cpu {cwd}/train.py": TWO,
    "--nnodes=1 --nproc-per-node=2 --rdzv-backend=c10d --rdzv-endpoint=localhost:0 --rdzv-id=7 "
    "--cpu {cwd}/train.py": TWO,
    "--nproc_per_node 1 --nnodes 1 --node_rank 0 --master_addr 127.0.0.1 --master_port {port} "
    "--cpu {cwd}/train.py --batch_size 4": {"args": ["--batch_size", "4"]},
    "--use_env --nproc_per_node=1 --cpu {cwd}/train.py": {},
}  # fmt: skip
DEEPSPEED = {
    "--config_file {cwd}/zero2.yaml {cwd}/train.py": {
        "precision": "bf16",
        "grad_accum": 4,
        "zero": 2,
        "plan": repr(Plan(deepspeed=DeepSpeedConfig(settings={"gradient_clipping": 1.0}))),
    },
    "--config_file {cwd}/zero3.yaml {cwd}/train.py": {
        "plan": repr(Plan(deepspeed=DeepSpeedConfig(settings="{cwd}/ds.json")))
    },
    "--use_deepspeed --cpu --zero_stage 3 --offload_optimizer_device none --zero3_init_flag true "
    "{cwd}/train.py": {"zero": 3},
}
# Commands for each of two nodes.
NODES = (
    "--cpu --num_processes 2 --num_machines 2 --machine_rank {node} --main_process_ip 127.0.0.1 "
    "--main_process_port {port} {cwd}/train.py",
    "--config_file {cwd}/nodes.yaml --machine_rank {node} {cwd}/train.py",
    "--cpu --nnodes=2 --nproc_per_node=1 --node_rank={node} --master_addr=127.0.0.1 "
    "--master_port={port} {cwd}/train.py",
)
# Commands that start nothing, and the option or key and the fix that the error names.
REFUSED = {
    "--use_megatron_lm --megatron_lm_gradient_clipping 1.0 {cwd}/train.py": (
        "`--megatron_lm_gradient_clipping`", "clip_norm=1.0",
    ),
    "--config_file {cwd}/sagemaker.yaml {cwd}/train.py": (
        "AMAZON_SAGEMAKER", "faccel config import",
    ),
    "--nproc_per_node=2 --redirects 3 {cwd}/train.py": ("`--redirects`", "use `--log-dir DIR`"),
}  # fmt: skip


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Returns a function that starts a command in a folder with the scripts and the files."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    texts = {**FILES, "train.py": PROBE, "package/__init__.py": "", "package/train.py": PROBE}
    (tmp_path / "package").mkdir()
    for name, text in texts.items():
        text = text.replace("{cwd}", str(tmp_path)).replace("{port}", port)
        (tmp_path / name).write_text(text)
    # The two others are in the reports.
    env = {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.getcwd()])}
    env |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def run(command, node=0):
        places = {"{cwd}": str(tmp_path), "{port}": port, "{node}": str(node)}
        for name, value in places.items():
            command = command.replace(name, value)
        return Command("launch", *command.split(), env=env)

    return run


def ranks_of(*commands):
    """Return what the ranks of all commands report, in order."""
    reports = []
    for command in commands:
        code, out, errors = command.wait()
        assert code == 0, errors
        reports += [json.loads(line) for line in out.splitlines()]
    return sorted(reports, key=lambda report: report["rank"])


def expected(changes, folder):
    """Return the reports of all ranks of one node."""
    report = {**ONE, **changes}
    report["plan"] = report["plan"].replace("{cwd}", str(folder))
    return [{**report, "rank": rank} for rank in range(report["world_size"])]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_starts_what_it_names(command, start, tmp_path):
    assert ranks_of(start(command)) == expected(COMMANDS[command], tmp_path)


@pytest.mark.parametrize("command", DEEPSPEED)
def test_a_command_starts_deepspeed_or_reports_that_it_is_not_installed(command, start, tmp_path):
    reason = BACKENDS["deepspeed"].probe(os.environ)
    if reason is None:
        changes = {"strategy": "deepspeed", **DEEPSPEED[command]}
        assert ranks_of(start(command)) == expected(changes, tmp_path)
    else:
        code, out, errors = start(command).wait()
        assert (code, out) == (1, "")
        assert f"the strategy `deepspeed` cannot run here. Got {reason}" in errors


@pytest.mark.parametrize("command", NODES)
def test_the_commands_of_two_nodes_start_one_world(command, start):
    reports = ranks_of(*[start(command, node) for node in range(2)])
    assert reports == [{**ONE, **TWO, "rank": rank, "node": [rank, 2]} for rank in range(2)]


@pytest.mark.parametrize("command", REFUSED)
def test_a_command_that_cannot_start_what_it_names_is_an_error_with_what_to_write(command, start):
    code, out, errors = start(command).wait()
    assert (code, out) == (2, "")
    for text in REFUSED[command]:
        assert text in errors
