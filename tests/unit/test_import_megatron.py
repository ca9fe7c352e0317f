"""Accelerate's section for Megatron-LM, as fields, a plan, and what to write in the script."""

import pytest
import yaml
from click.testing import CliRunner

from faccel.cli.commands import main
from faccel.config_sources import resolve
from faccel.errors import ConfigError
from faccel.launching.import_accelerate import from_accelerate
from faccel.plan import DdpConfig, FsdpConfig, Plan

# As `accelerate config` of version 1.15 writes it.
FILE = """\
compute_environment: LOCAL_MACHINE
debug: false
distributed_type: MEGATRON_LM
downcast_bf16: 'no'
enable_cpu_affinity: false
machine_rank: 0
main_training_function: main
megatron_lm_config:
  megatron_lm_gradient_clipping: 1.0
  megatron_lm_num_micro_batches: 4
  megatron_lm_pp_degree: 2
  megatron_lm_recompute_activations: true
  megatron_lm_sequence_parallelism: true
  megatron_lm_tp_degree: 2
  megatron_lm_use_distributed_optimizer: true
mixed_precision: bf16
num_machines: 1
num_processes: 8
rdzv_backend: static
same_network: true
use_cpu: false
"""
FULL = Plan(activation_checkpoint="full")
ZERO_1 = Plan(ddp=DdpConfig(shard_optimizer=True))
ZERO_2 = Plan(fsdp=FsdpConfig(reshard_after_forward=False))
SHARDED = {"dp_shard": -1}
REPLICAS = {"dp_replicate": -1}
# Keys and values, the mesh and the plan that are their equal, keys for the script, keys without
# an equal.
EQUALS = [
    ({}, {}, Plan(), "", ""),
    ({"tp_degree": 1, "pp_degree": 1}, {}, Plan(), "", ""),
    ({"tp_degree": 4}, {"tp": 4} | REPLICAS, Plan(), "", ""),
    ({"tp_degree": "2", "pp_degree": 4}, {"tp": 2, "pp": 4} | REPLICAS, Plan(), "", ""),
    ({"context_parallel_size": 2}, {"cp": 2} | REPLICAS, Plan(), "", ""),
    ({"expert_model_parallel_size": 2}, {"ep": 2} | SHARDED, Plan(), "", ""),
    ({"expert_tensor_parallel_size": 1}, {}, Plan(), "", ""),
    ({"expert_tensor_parallel_size": 2}, {}, Plan(), "", "expert_tensor_parallel_size"),
    ({"use_distributed_optimizer": "true"}, {}, ZERO_1, "", ""),
    ({"use_distributed_optimizer": False}, {}, Plan(), "", ""),
    ({"use_distributed_optimizer": True, "tp_degree": 2}, {"tp": 2} | SHARDED, ZERO_2, "", ""),
    ({"use_custom_fsdp": True, "tp_degree": 2}, {"tp": 2} | SHARDED, Plan(), "", ""),
    ({"use_custom_fsdp": True, "use_distributed_optimizer": True}, SHARDED, Plan(), "", ""),
    ({"optimizer_cpu_offload": True}, SHARDED, Plan(offload=True), "", ""),
    ({"recompute_activations": "true"}, {}, Plan(), "", ""),
    ({"recompute_granularity": "selective"}, {}, Plan(), "", ""),
    ({"recompute_granularity": "full", "recompute_method": "uniform"}, {}, FULL, "", ""),
    ({"recompute_granularity": "full", "recompute_num_layers": 1}, {}, FULL, "", ""),
    (
        {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 2},
        {},
        FULL,
        "",
        "recompute_method recompute_num_layers",
    ),
    ({"gradient_clipping": 0.5}, {}, Plan(), "gradient_clipping", ""),
    ({"gradient_clipping": 0.0}, {}, Plan(), "", ""),
    ({"sequence_parallelism": "true"}, {}, Plan(), "sequence_parallelism", ""),
    ({"sequence_parallelism": "false"}, {}, Plan(), "", ""),
    ({"no_load_optim": True, "no_save_optim": False}, {}, Plan(), "no_load_optim", ""),
    ({"no_save_optim": True, "eod_mask_loss": True}, {}, Plan(), "eod_mask_loss no_save_optim", ""),
    ({"calculate_per_token_loss": True}, {}, Plan(), "calculate_per_token_loss", ""),
    (
        {"decoder_last_pipeline_num_layers": 3, "pp_degree": 2},
        {"pp": 2} | REPLICAS,
        Plan(),
        "decoder_last_pipeline_num_layers",
        "",
    ),
    (
        {"attention_dropout": 0.1, "hidden_dropout": 0.0},
        {},
        Plan(),
        "attention_dropout",
        "",
    ),
    ({"hidden_dropout": 0.1}, {}, Plan(), "hidden_dropout", ""),
    (
        {"use_rotary_position_embeddings": True},
        {},
        Plan(),
        "use_rotary_position_embeddings",
        "",
    ),
    ({"attention_softmax_in_fp32": True, "attention_backend": True}, {}, Plan(), "", ""),
    (
        {"attention_softmax_in_fp32": False, "attention_backend": False},
        {},
        Plan(),
        "",
        "attention_backend attention_softmax_in_fp32",
    ),
    (
        {"use_precision_aware_optimizer": False, "overlap_cpu_optimizer_d2h_h2d": False},
        {},
        Plan(),
        "",
        "",
    ),
    (
        {"use_precision_aware_optimizer": True, "overlap_cpu_optimizer_d2h_h2d": True},
        {},
        Plan(),
        "",
        "overlap_cpu_optimizer_d2h_h2d use_precision_aware_optimizer",
    ),
    ({"model_type_name": "gpt"}, {}, Plan(), "", "model_type_name"),
]


def megatron(keys):
    section = {f"megatron_lm_{key}": value for key, value in keys.items()}
    return {"distributed_type": "MEGATRON_LM", "megatron_lm_config": section}


def long_names(words):
    return [f"megatron_lm_config.megatron_lm_{word}" for word in words.split()]


@pytest.mark.parametrize(("keys", "mesh", "plan", "in_script", "unsupported"), EQUALS, ids=str)
def test_every_key_is_converted_or_listed(keys, mesh, plan, in_script, unsupported):
    imported = from_accelerate(megatron(keys))
    assert imported.values.get("mesh", {}) == mesh
    assert (resolve(dict(imported.values)).plan or Plan()) == plan
    assert sorted(imported.in_script) == long_names(in_script)
    assert sorted(imported.without_equivalent) == long_names(unsupported)


def test_all_27_options_of_accelerate_are_in_the_table():
    parser = pytest.importorskip("accelerate.commands.launch").launch_command_parser()
    prefix = "--megatron_lm_"
    options = {
        option.removeprefix(prefix)
        for action in parser._actions
        for option in action.option_strings
        if option.startswith(prefix)
    }
    assert len(options) == 27
    converted = {key for keys, *_ in EQUALS for key in keys} | {"num_micro_batches"}
    assert options == converted - {"model_type_name"}


def test_a_file_is_imported_with_a_mesh_and_what_to_write_in_the_script(tmp_path):
    source, target = tmp_path / "megatron.yaml", tmp_path / "faccel.yaml"
    source.write_text(FILE)
    out = CliRunner().invoke(main, ["config", "import", str(source), "-o", str(target)])
    assert out.exit_code == 0, out.output
    assert yaml.safe_load(target.read_text()) == {
        "grad_accum": 4,
        "mesh": {"dp_shard": -1, "pp": 2, "tp": 2},
        "mixed_precision": "bf16",
        "nproc": 8,
        "plan": {"fsdp": {"reshard_after_forward": False}},
    }
    lines = out.stderr.splitlines()
    assert sum(line.startswith("in the script: ") for line in lines) == 2
    assert any("clip_norm=1.0" in line for line in lines)
    assert any("sequence_colwise" in line for line in lines)


@pytest.mark.parametrize("value", ["two", 0, -1, 1.5])
def test_an_invalid_degree_is_an_error(value):
    if value == 0:  # Accelerate reads it as 1
        assert not from_accelerate(megatron({"tp_degree": value})).values
        return
    with pytest.raises(ConfigError, match="write `megatron_lm_tp_degree: 1`"):
        from_accelerate(megatron({"tp_degree": value}))


def test_an_invalid_number_of_micro_batches_names_the_key_of_the_file():
    with pytest.raises(ConfigError, match="write `megatron_lm_num_micro_batches: 1`"):
        from_accelerate(megatron({"num_micro_batches": 0}))
