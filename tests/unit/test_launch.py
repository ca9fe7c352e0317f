"""A launch as a value: arguments of torchrun, environment of the ranks, and usage errors."""

import importlib
import re

import attrs
import click
import pytest
from click.testing import CliRunner

from faccel.cli.commands import main
from faccel.cli.foreign_options import EQUALS
from faccel.cli.launch_command import launch
from faccel.errors import LaunchError
from faccel.launching.spec import LaunchSpec, environment_of, torchrun_arguments
from faccel.mesh import MeshSpec
from faccel.plan_values import to_plan

ARGUMENTS = {
    "one node": (
        {"nproc": 2},
        "--nnodes 1 --nproc-per-node 2 --max-restarts 0 --standalone -- train.py --lr 1",
    ),
    "bound to the cores near the GPUs": (
        {"nproc": 2, "numa_binding": "node"},
        "--nnodes 1 --nproc-per-node 2 --max-restarts 0 --standalone --numa-binding node "
        "-- train.py --lr 1",
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
    "`numa_binding` must be one of": ["--numa-binding", "nod", "--nproc", "2", "--cpu", "FILE"],
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
# Command lines with the words of Accelerate and torchrun, and those of faccel that they stand for.
COMMANDS = {
    "--num_processes 2": "--nproc 2",
    "--num-processes=2": "--nproc 2",
    "--multi_gpu --num_processes 8 --mixed_precision bf16": "--nproc 8 --mixed-precision bf16",
    "--num_processes 16 --num_machines 2 --machine_rank 1 --main_process_ip node0 "
    "--main_process_port 29501": "--nproc 8 --nnodes 2 --node-rank 1 --main-address node0 "
    "--main-port 29501",
    "--num_machines 1 --mixed_precision no --dynamo_backend no": "--mixed-precision no",
    "--cpu --num_processes 2": "--cpu --nproc 2",
    "--use_cpu --num_processes 2": "--device cpu --nproc 2",
    "--gpu_ids 0,1 --num_processes 2": "--gpu-ids 0,1 --nproc 2",
    "--gpu_ids=all": "--gpu-ids all",
    "--num_cpu_threads_per_process 4 --num_processes 1": "--threads-per-process 4 --nproc 1",
    "--use_fsdp --multi_gpu --num_processes 4": "--nproc 4 --mesh dp_shard=-1",
    "--use_fsdp --num_processes 4": "--nproc 4 --mesh dp_shard=-1",
    "--use_fsdp --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP "
    "--fsdp_transformer_layer_cls_to_wrap LlamaDecoderLayer --fsdp_sharding_strategy FULL_SHARD "
    "--fsdp_offload_params false": "--mesh dp_shard=-1 --plan units=LlamaDecoderLayer",
    "--use_fsdp --fsdp_version 2 --fsdp_reshard_after_forward false "
    "--fsdp_activation_checkpointing true": "--mesh dp_shard=-1 "
    "--plan fsdp.reshard_after_forward=false,activation_checkpoint=full",
    "--use_fsdp --fsdp_sharding_strategy HYBRID_SHARD --num_processes 4": "--nproc 4 "
    "--mesh dp_replicate=-1,dp_shard=4",
    "--use_deepspeed --zero_stage 2 --num_processes 2": "--nproc 2 --strategy deepspeed --zero 2",
    "--use_deepspeed --deepspeed_config_file ds.json": "--strategy deepspeed "
    "--plan deepspeed.settings=ds.json",
    "--use_deepspeed --zero_stage 3 --offload_optimizer_device cpu --offload_param_device cpu "
    "--zero3_init_flag true": "--strategy deepspeed --zero 3 "
    "--plan deepspeed.offload_optimizer=cpu,deepspeed.offload_params=cpu",
    "--use_deepspeed --gradient_accumulation_steps 4 --gradient_clipping 1.0": "--grad-accum 4 "
    "--strategy deepspeed --plan deepspeed.settings.gradient_clipping=1.0",
    "--dynamo_backend inductor": "--plan compile=whole",
    "--dynamo_backend inductor --dynamo_use_regional_compilation": "--plan compile=units",
    "--use_parallelism_config --parallelism_config_dp_shard_size 2 "
    "--parallelism_config_tp_size 2 --num_processes 4": "--nproc 4 --mesh dp_shard=2,tp=2",
    "--use_parallelism_config --parallelism_config_sp_size 2 --num_processes 2": (
        "--nproc 2 --mesh cp=2"
    ),
    "--mixed_precision fp8 --fp8_backend ao --fp8_pad_inner_dim true": "--mixed-precision fp8",
    "--mixed_precision fp8 --fp8_backend te": "--mixed-precision fp8 "
    "--plan fp8.backend=te,fp8.recipe=delayed,fp8.te.in_eval=false",
    "--mixed_precision fp8 --fp8_backend te --fp8_use_autocast_during_eval --fp8_format E4M3 "
    "--fp8_margin 1 --fp8_interval 1 --fp8_amax_history_len 16 --fp8_amax_compute_algo most_recent "
    "--fp8_override_linear_precision false,false,false": "--mixed-precision fp8 "
    "--plan fp8.backend=te,fp8.recipe=delayed,fp8.te.format=e4m3,fp8.te.margin=1,"
    "fp8.te.amax_history=16,fp8.te.amax=most_recent",
    "--debug --same_network --main_training_function main": "--debug",
    "--nproc_per_node 2 --nnodes 1 --standalone": "--nproc 2 --nnodes 1",
    "--nproc-per-node=2 --nnodes=2 --node_rank=0 --main-address=node0": "--nproc 2 --nnodes 2 "
    "--node-rank 0 --main-address node0",
    "--nnodes 2 --node_rank 1 --master_addr node0 --master_port 29501": "--nnodes 2 "
    "--node-rank 1 --main-address node0 --main-port 29501",
    "--nproc_per_node 2 --use_env": "--nproc 2",
    "--tee 3 --log_dir logs": "--tee --log-dir logs",
    "-t 3 --log_dir logs": "--tee --log-dir logs",
    "--tee=3 --log_dir logs": "--tee --log-dir logs",
    "--tee --log_dir logs": "--tee --log-dir logs",
    "--max_restarts 3 --log_dir logs": "--max-restarts 3 --log-dir logs",
    "--rdzv_backend c10d --rdzv_endpoint node0:29400": "--rdzv-endpoint node0:29400",
    "--multi_gpu -m": "-m",
    "--numa_binding=node": "--numa-binding node",
    "--enable_cpu_affinity --num_processes 2": "--nproc 2 --numa-binding node",
}
SCRIPT = ["train.py", "--num_processes", "3", "--lr", "1"]


def options_of(words):
    """The options and the script that `faccel launch` runs with."""
    with launch.make_context("launch", [*words, *SCRIPT]) as context:
        params = dict(context.params)
    if params["plan"]:
        params["plan"] = to_plan(params["plan"])
    return params


@pytest.mark.parametrize("command", COMMANDS)
def test_the_words_of_another_launcher_start_what_they_name(command):
    assert options_of(command.split()) == options_of(COMMANDS[command].split())


def test_a_file_of_accelerate_is_read_and_options_are_stronger(tmp_path):
    file = tmp_path / "accelerate.yaml"
    file.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: FSDP\nnum_processes: 4\n"
        "mixed_precision: fp16\nfsdp_config:\n  fsdp_offload_params: true\n"
    )
    words = ["--config_file", str(file), "--mixed_precision", "bf16"]
    expected = "--nproc 4 --mesh dp_shard=-1 --mixed-precision bf16 --plan offload=true"
    assert options_of(words) == options_of(expected.split())


def accelerate_options():
    parser = pytest.importorskip("accelerate.commands.launch").launch_command_parser()
    for action in parser._actions:
        for option in action.option_strings:
            yield option, action.nargs == 0


def torchrun_options():
    parser = importlib.import_module("torch.distributed.run").get_args_parser()
    for action in parser._actions:
        for option in action.option_strings:
            yield option, action.nargs == 0


@pytest.mark.parametrize("options_of_launcher", [accelerate_options, torchrun_options])
def test_each_option_of_another_launcher_is_translated_or_an_error_with_what_to_write(
    options_of_launcher,
):
    unknown = []
    for option, is_switch in options_of_launcher():
        if option in ("--help", "-h"):
            continue
        value = "eager" if "backend" in option else "1"
        words = [option] if is_switch else [option, value]
        try:
            options_of(words)
        except click.ClickException as error:
            if "To fix: " not in error.message:
                unknown.append((option, error.message))
    assert not unknown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--aws_access_key_id x", "`--aws_access_key_id` is not an option"),
        ("--use_fsdp --fsdp_backward_prefetch BACKWARD_POST", "`--plan`"),
        ("--use_megatron_lm --megatron_lm_use_precision_aware_optimizer true", "`--mesh"),
        ("--use_megatron_lm --megatron_lm_gradient_clipping 1.0", "clip_norm=1.0"),
        ("--megatron_lm_tp_degree 2", "has no effect without `--use_megatron_lm`"),
        ("--nproc 2 --num_processes 3", "`--nproc` is given in two ways"),
        ("--use_fsdp --use_deepspeed", "a launch has one strategy"),
        ("--num_processes 3 --num_machines 2", "a multiple of `num_machines`"),
        ("--fsdp_offload_params true", "has no effect without `--use_fsdp`"),
        ("--zero_stage 2", "has no effect without `--use_deepspeed`"),
        ("--rdzv_backend etcd", "use `--rdzv-endpoint HOST:PORT`"),
        ("--num_processes -1", "`num_processes` of the file must be a whole number"),
        ("--gpu_ids 0;1", "`--gpu-ids` must be numbers of GPUs"),
        ("--gpu_ids a --cpu", "`--gpu-ids` must be numbers of GPUs"),
        ("--main_process_port 65536", "a whole number from 0 to 65535"),
        ("--num_processes many", "`num_processes` of the file must be a whole number"),
        ("--config_file none.yaml", "none.yaml"),
        ("--tee 1", "use `--log-dir DIR --tee`"),
        ("--tee 0:1,1:3", "use `--log-dir DIR --tee`"),
        ("-r 3", "use `--log-dir DIR`"),
        ("--redirects=3", "use `--log-dir DIR`"),
        ("--virtual-local-rank", "use `ctx.local_rank`"),
        ("--num_processs 2", "Did you mean"),
    ],
)
def test_an_option_without_an_equivalent_is_an_error_with_what_to_write(words, message):
    check_usage_error([*words.split(), "FILE"], message)


def test_the_options_that_the_errors_name_exist():
    options = {name for param in launch.params for name in (*param.opts, *param.secondary_opts)}
    for text in EQUALS.values():
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
