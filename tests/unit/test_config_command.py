"""`faccel config`, and configuration files of all versions of Accelerate."""

import importlib.util
import os
import re

import pytest
import torch
import yaml
from click.testing import CliRunner

import faccel
from faccel import Plan
from faccel.cli.commands import main
from faccel.config_sources import resolve
from faccel.errors import ConfigError
from faccel.launching.import_accelerate import from_accelerate
from faccel.parallel import (
    Compile,
    DeepSpeedConfig,
    Fp8,
    FsdpConfig,
    TransformerEngineConfig,
)
from faccel.plan_values import to_plan


@pytest.fixture
def call(tmp_path):
    env = {"HOME": str(tmp_path), "XDG_CONFIG_HOME": "", "FACCEL_CONFIG": ""}
    return lambda *words: CliRunner(env=env).invoke(main, ["config", *words])


def test_the_commands_create_change_print_and_check_the_file(call, tmp_path):
    file = tmp_path / ".config" / "faccel" / "config.yaml"
    assert call("path").output == f"{file}\n"
    assert call("show").output.startswith("file: none\nmixed_precision = no  (default)")
    assert call("default").output == f"{file}\n"
    out = call("default")
    assert (out.exit_code, "--force" in out.output) == (1, True)
    assert call("default", "--force").exit_code == 0
    assert call("set", "seed=3", "debug=yes", "mesh=dp_replicate=2").exit_code == 0
    assert yaml.safe_load(file.read_text()) == {"seed": 3, "debug": True, "mesh": "dp_replicate=2"}
    assert f"seed = 3  (file {file}:1, over default 0)" in call("show").output
    assert call("check", str(file)).output == f"{file}: valid\n"
    file.write_text("sed: 3\n")
    out = call("check", str(file))
    assert (out.exit_code, "`seed`" in out.output) == (1, True)
    out = call("show")
    assert (out.exit_code, "Traceback" in out.output) == (1, False)


@pytest.mark.parametrize(
    "words", [["seed"], ["sed=1"], ["seed=x"], ["seed=-1"], ["mesh=dp=2"]], ids=str
)
def test_an_invalid_value_leaves_the_file_unchanged(call, tmp_path, words):
    call("set", "seed=1")
    file = tmp_path / ".config" / "faccel" / "config.yaml"
    before = file.read_text()
    out = call("set", "debug=yes", *words)
    assert out.exit_code == 2
    assert file.read_text() == before


BEFORE = {
    "own.yaml": "# comment\nseed: 1  # the usual\n\nrun_dir: 'here'\n",
    "own.toml": '# comment\nseed = 1  # the usual\n\nrun_dir = "here"\n',
    "own.json": '{"seed": 1, "run_dir": "here"}',
}
AFTER = {
    "own.yaml": "# comment\nseed: 2  # the usual\n\nrun_dir: 'here'\ndebug: true\n",
    "own.toml": '# comment\nseed = 2  # the usual\n\nrun_dir = "here"\ndebug = true\n',
    "own.json": '{\n  "seed": 2,\n  "run_dir": "here",\n  "debug": true\n}\n',
}


@pytest.mark.parametrize("name", BEFORE)
def test_a_change_keeps_comments_order_links_and_mode(tmp_path, name):
    target = tmp_path / f"kept-{name}"
    target.write_text(BEFORE[name])
    target.chmod(0o600)
    (tmp_path / name).symlink_to(target)
    env = {"FACCEL_CONFIG": str(tmp_path / name)}
    out = CliRunner(env=env).invoke(main, ["config", "set", "seed=2", "debug=yes"])
    assert out.exit_code == 0, out.output
    assert target.read_text() == AFTER[name]
    assert (tmp_path / name).is_symlink()
    assert target.stat().st_mode & 0o777 == 0o600
    assert CliRunner().invoke(main, ["config", "check", str(tmp_path / name)]).exit_code == 0
    converted = tmp_path / f"new-{name}"
    source = tmp_path / "a.yaml"
    source.write_text("distributed_type: FSDP\nmixed_precision: bf16\nnum_processes: 2\n")
    out = CliRunner().invoke(main, ["config", "import", str(source), "-o", str(converted)])
    assert out.exit_code == 0, out.output
    assert CliRunner().invoke(main, ["config", "check", str(converted)]).exit_code == 0
    assert len(list(tmp_path.iterdir())) == 4


def test_a_file_of_the_user_is_never_written(tmp_path):
    file = tmp_path / "training.yaml"
    file.write_text("model: big\nfaccel:\n  seed: 1\n")
    before = file.read_text()
    runner = CliRunner(env={"FACCEL_CONFIG": f"{file}#faccel"})
    for words in (["set", "seed=2"], ["default", "--force"]):
        out = runner.invoke(main, ["config", *words])
        assert (out.exit_code, "edit" in out.output) == (2, True)
    assert file.read_text() == before
    assert runner.invoke(main, ["config", "show"]).output.startswith(f"file: {file}#faccel")
    file.write_text("mesh:\n  dp_shard: 2\n")
    out = CliRunner(env={"FACCEL_CONFIG": str(file)}).invoke(
        main, ["config", "set", "mesh=dp_shard=4"]
    )
    assert (out.exit_code, "by hand" in out.output) == (1, True)
    assert file.read_text() == "mesh:\n  dp_shard: 2\n"
    out = CliRunner(env={"FACCEL_CONFIG": "/proc/none/x.yaml"}).invoke(main, ["config", "default"])
    assert (out.exit_code, "cannot be written" in out.output) == (1, True)


# The keys that each version of Accelerate writes, with values of this test.
FILES = {
    "0.11": (
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nfp16: true\n"
        "machine_rank: 0\n"
        "main_process_ip: null\nmain_process_port: null\nmain_training_function: main\n"
        "num_machines: 1\n"
        "num_processes: 2\ndeepspeed_config: {}\nfsdp_config: {}\nuse_cpu: false\n",
        {"mixed_precision": "fp16", "nproc": 2},
        "",
        "",
        [],
    ),
    "0.12": (
        "compute_environment: LOCAL_MACHINE\ndeepspeed_config: {}\ndistributed_type: 'NO'\n"
        "downcast_bf16: 'no'\n"
        "fsdp_config: {}\nmachine_rank: 0\nmain_process_ip: null\nmain_process_port: null\n"
        "main_training_function: main\nmixed_precision: 'no'\nnum_machines: 1\n"
        "num_processes: 1\nuse_cpu: true\n",
        {"device": "cpu", "nproc": 1},
        "",
        "",
        [],
    ),
    "0.28": (
        "compute_environment: LOCAL_MACHINE\ndebug: true\ndistributed_type: MULTI_CPU\n"
        "downcast_bf16: 'no'\n"
        "ipex_config: {ipex: true}\nmachine_rank: 0\nmain_process_ip: 127.0.0.1\n"
        "main_process_port: 29500\n"
        "main_training_function: main\nmixed_precision: bf16\n"
        "mpirun_config: {mpirun_ccl: '1', mpirun_hostfile: hosts}\n"
        "num_machines: 4\nnum_processes: 16\nrdzv_backend: static\nsame_network: true\n"
        "tpu_env: []\n"
        "tpu_use_cluster: false\ntpu_use_sudo: false\nuse_cpu: true\n",
        {"mixed_precision": "bf16", "device": "cpu", "debug": True, "nproc": 4},
        "",
        "--nnodes 4 --node-rank 0 --main-address 127.0.0.1 --main-port 29500",
        ["ipex_config", "mpirun_config.mpirun_ccl", "mpirun_config.mpirun_hostfile"],
    ),
    "0.34": (
        "compute_environment: LOCAL_MACHINE\ndebug: false\ndistributed_type: DEEPSPEED\n"
        "deepspeed_config:\n"
        "  gradient_accumulation_steps: 4\n  zero_stage: 2\n"
        "dynamo_config: {dynamo_backend: INDUCTOR}\n"
        "fp8_config: {backend: TE, fp8_format: E4M3}\nmixed_precision: fp8\n"
        "num_machines: 2\nnum_processes: 16\n"
        "machine_rank: 1\nmain_process_ip: head\nmain_process_port: 1234\n"
        "rdzv_backend: c10d\nuse_cpu: false\n",
        {"grad_accum": 4, "strategy": "deepspeed", "zero": 2, "nproc": 8},
        "faccel.Plan(compile='whole')",
        "--nnodes 2 --rdzv-endpoint head:1234",
        [
            "fp8_config.backend",
            "fp8_config.fp8_format",
            "mixed_precision",
        ],
    ),
    "latest": (
        "compute_environment: LOCAL_MACHINE\ndistributed_type: FSDP\n"
        "enable_cpu_affinity: false\nfsdp_config:\n"
        "  fsdp_version: 2\n  fsdp_reshard_after_forward: true\nmixed_precision: bf16\n"
        "num_machines: 1\n"
        "num_processes: 8\nparallelism_config:\n  parallelism_config_dp_replicate_size: 2\n"
        "  parallelism_config_dp_shard_size: 4\n  parallelism_config_tp_size: 1\n"
        "use_cpu: false\n",
        {"mixed_precision": "bf16", "mesh": {"dp_replicate": 2, "dp_shard": 4}, "nproc": 8},
        "",
        "",
        [],
    ),
}


def te_plan(recipe="delayed", in_eval=False, **options):
    config = TransformerEngineConfig(in_eval=in_eval, **options)
    return Plan(fp8=Fp8(backend="te", recipe=recipe, te=config))


FP8_SECTIONS = [
    ("{backend: AO, enable_fsdp_float8_all_gather: true, pad_inner_dim: true}", Plan(), []),
    (
        "{backend: AO, enable_fsdp_float8_all_gather: false, pad_inner_dim: false}",
        Plan(fp8=Fp8(all_gather=False)),
        ["fp8_config.pad_inner_dim"],
    ),
    ("{backend: AO, margin: 1}", Plan(), ["fp8_config.margin"]),
    ("{backend: MSAMP, opt_level: O2}", Plan(), ["fp8_config.backend", "fp8_config.opt_level"]),
    ("{backend: TE}", te_plan(), []),
    # As `accelerate config` writes it.
    (
        "{backend: TE, use_autocast_during_eval: false, margin: 0, interval: 1,"
        " fp8_format: HYBRID, amax_history_length: 1024, amax_compute_algorithm: max,"
        " override_linear_precision: [false, false, false]}",
        te_plan(),
        [],
    ),
    # With the names of `TERecipeKwargs`, and other values.
    (
        "{fp8_backend: te, use_autocast_during_eval: true, margin: 2, interval: 16,"
        " fp8_format: E4M3, amax_history_len: 32, amax_compute_algo: most_recent,"
        " override_linear_precision: '(false, false, true)'}",
        te_plan(margin=2, format="e4m3", amax_history=32, amax="most_recent", in_eval=True),
        ["fp8_config.interval", "fp8_config.override_linear_precision"],
    ),
    (
        "{backend: TE, fp8_format: E5M2, amax_compute_algo: mean}",
        te_plan(),
        ["fp8_config.amax_compute_algo", "fp8_config.fp8_format"],
    ),
    (
        "{backend: TE, use_mxfp8_block_scaling: true, margin: 0, amax_history_length: 16,"
        " amax_compute_algorithm: mean}",
        te_plan("mxfp8"),
        ["fp8_config.amax_compute_algorithm", "fp8_config.amax_history_length"],
    ),
]


@pytest.mark.parametrize(("section", "plan", "unsupported"), FP8_SECTIONS)
def test_a_file_with_fp8_is_imported(section, plan, unsupported):
    text = f"distributed_type: MULTI_GPU\nmixed_precision: fp8\nfp8_config: {section}\n"
    imported = from_accelerate(yaml.safe_load(text))
    assert imported.values["mixed_precision"] == "fp8"
    assert to_plan(imported.values.get("plan", {})) == plan
    assert sorted(imported.without_equivalent) == unsupported


@pytest.mark.parametrize("key", ["margin", "amax_history_length"])
def test_a_number_of_fp8_that_is_none_is_an_error(key):
    section = {"backend": "TE", key: "many"}
    with pytest.raises(ConfigError, match=f"`{key.removesuffix('gth')}` of the file"):
        from_accelerate({"distributed_type": "NO", "mixed_precision": "fp8", "fp8_config": section})


@pytest.mark.parametrize("version", FILES)
def test_files_of_accelerate_are_imported(call, tmp_path, version):
    text, values, plan, options, unsupported = FILES[version]
    source = tmp_path / "accelerate.yaml"
    source.write_text(text)
    out = call("import", str(source), "-o", str(tmp_path / "out.yaml"))
    assert out.exit_code == 0, out.output
    written = yaml.safe_load((tmp_path / "out.yaml").read_text()) or {}
    assert to_plan(written.pop("plan", {})) == eval(plan or "faccel.Plan()", {"faccel": faccel})
    assert written == values
    assert f"start with: faccel launch {options}".strip() in out.output.replace(" script.py", "")
    listed = [
        line.split(": ")[1] for line in out.stderr.splitlines() if line.startswith("no equivalent")
    ]
    assert sorted(listed) == unsupported
    assert call("import", str(source), "-o", str(tmp_path / "out.yaml")).exit_code == 1


def test_a_file_of_another_program_is_an_error():
    with pytest.raises(ConfigError):
        from_accelerate({"seed": 1})
    assert "FACCEL_LAUNCH" not in os.environ


@pytest.mark.parametrize(
    ("config", "values", "options", "unsupported"),
    [
        ({"distributed_type": "MEGATRON_LM"}, {}, "", {}),
        ({"distributed_type": "TPU"}, {}, "", {"distributed_type": "TPU"}),
        (
            {"distributed_type": "FSDP", "fsdp_config": {"fsdp_ignored_modules": "head"}},
            {"mesh": {"dp_shard": -1}},
            "",
            {"fsdp_config.fsdp_ignored_modules": "head"},
        ),
        ({"distributed_type": False}, {}, "", {}),
        ({"distributed_type": "FSDPP"}, {}, "", {"distributed_type": "FSDPP"}),
        ({"distributed_type": "MULTI_XPU", "rdzv_backend": "static"}, {}, "", {}),
        (
            {
                "distributed_type": "NO",
                "num_machines": 2,
                "num_processes": 2,
                "rdzv_backend": "etcd",
            },
            {"nproc": 1},
            "--nnodes 2 --node-rank 0 --main-address HOST",
            {"rdzv_backend": "etcd"},
        ),
        ({"distributed_type": "NO", "use_cpu": "false", "debug": "no", "fp16": "0"}, {}, "", {}),
        ({"distributed_type": "NO", "mixed_precision": False}, {}, "", {}),
        (
            {"compute_environment": "AMAZON_SAGEMAKER"},
            {},
            "",
            {"compute_environment": "AMAZON_SAGEMAKER"},
        ),
        (
            {
                "distributed_type": "DEEPSPEED",
                "deepspeed_config": {"gradient_accumulation_steps": "auto"},
            },
            {"strategy": "deepspeed"},
            "",
            {"deepspeed_config.gradient_accumulation_steps": "auto"},
        ),
        (
            {
                "distributed_type": "MULTI_GPU",
                "num_processes": 8,
                "num_machines": 2,
                "main_process_ip": "h",
            },
            {"nproc": 4},
            "--nnodes 2 --node-rank 0 --main-address h",
            {},
        ),
    ],
)
def test_unsupported_keys_are_reported_and_the_argument_is_unchanged(
    config, values, options, unsupported
):
    before = str(config)
    for _ in range(2):
        imported = from_accelerate(config)
        assert dict(imported.values) == values
        assert " ".join(imported.options) == options
        assert dict(imported.without_equivalent) == unsupported
    assert str(config) == before


def fsdp(**keys):
    return {"distributed_type": "FSDP", "num_processes": 8, "num_machines": 2, "fsdp_config": keys}


def deepspeed(**keys):
    return {"distributed_type": "DEEPSPEED", "deepspeed_config": keys}


def dynamo(**keys):
    return {"distributed_type": "NO", "dynamo_config": keys}


SHARDED = {"mesh": {"dp_shard": -1}}
HYBRID = {"mesh": {"dp_replicate": -1, "dp_shard": 4}}
ZERO_3 = {"strategy": "deepspeed", "zero": 3}
KEEP = Plan(fsdp=FsdpConfig(reshard_after_forward=False))
# A file of Accelerate, the fields and the plan that are its equal, and the keys without one.
EQUALS = [
    (fsdp(), SHARDED, Plan(), []),
    (fsdp(fsdp_version=2, fsdp_reshard_after_forward=True), SHARDED, Plan(), []),
    (fsdp(fsdp_version=2, fsdp_reshard_after_forward=False), SHARDED, KEEP, []),
    (fsdp(fsdp_sharding_strategy="FULL_SHARD"), SHARDED, Plan(), []),
    (fsdp(fsdp_sharding_strategy="1"), SHARDED, Plan(), []),
    (fsdp(fsdp_sharding_strategy=2), SHARDED, KEEP, []),
    (fsdp(fsdp_sharding_strategy="SHARD_GRAD_OP"), SHARDED, KEEP, []),
    (fsdp(fsdp_sharding_strategy="NO_SHARD"), {}, Plan(), []),
    (fsdp(fsdp_reshard_after_forward="HYBRID_SHARD"), HYBRID, Plan(), []),
    (fsdp(fsdp_sharding_strategy="HYBRID_SHARD_ZERO2"), HYBRID, KEEP, []),
    (fsdp(fsdp_offload_params=True), SHARDED, Plan(offload=True), []),
    (fsdp(fsdp_offload_params="true"), SHARDED, Plan(offload=True), []),
    (fsdp(fsdp_offload_params=False), SHARDED, Plan(), []),
    (
        fsdp(fsdp_activation_checkpointing=True),
        SHARDED,
        Plan(activation_checkpoint="full"),
        [],
    ),
    (
        fsdp(
            fsdp_auto_wrap_policy="TRANSFORMER_BASED_WRAP",
            fsdp_transformer_layer_cls_to_wrap="Block, Other",
        ),
        SHARDED,
        Plan(units=("Block", "Other")),
        [],
    ),
    (
        fsdp(fsdp_auto_wrap_policy="SIZE_BASED_WRAP", fsdp_min_num_params=1000),
        SHARDED,
        Plan(units=1000),
        [],
    ),
    (
        fsdp(fsdp_auto_wrap_policy="NO_WRAP"),
        SHARDED,
        Plan(),
        ["fsdp_config.fsdp_auto_wrap_policy"],
    ),
    (fsdp(fsdp_forward_prefetch=True), SHARDED, Plan(fsdp=FsdpConfig(prefetch=1)), []),
    (
        fsdp(fsdp_backward_prefetch="BACKWARD_PRE", fsdp_use_orig_params=True),
        SHARDED,
        Plan(),
        [],
    ),
    (
        fsdp(fsdp_backward_prefetch="NO_PREFETCH"),
        SHARDED,
        Plan(),
        ["fsdp_config.fsdp_backward_prefetch"],
    ),
    (
        fsdp(fsdp_state_dict_type="SHARDED_STATE_DICT", fsdp_sync_module_states=True),
        SHARDED,
        Plan(),
        [],
    ),
    (
        fsdp(fsdp_cpu_ram_efficient_loading=True),
        SHARDED,
        Plan(),
        [],
    ),
    (deepspeed(), {"strategy": "deepspeed"}, Plan(), []),
    (deepspeed(zero_stage=0), {"strategy": "deepspeed", "zero": 0}, Plan(), []),
    (
        deepspeed(zero_stage=2, offload_optimizer_device="cpu", offload_param_device="none"),
        {"strategy": "deepspeed", "zero": 2},
        Plan(deepspeed=DeepSpeedConfig(offload_optimizer="cpu")),
        [],
    ),
    (
        deepspeed(zero_stage="3", offload_param_device="cpu", zero3_init_flag=True),
        ZERO_3,
        Plan(deepspeed=DeepSpeedConfig(offload_params="cpu")),
        [],
    ),
    (
        deepspeed(zero_stage=3, offload_param_device="nvme", offload_param_nvme_path="/nvme"),
        ZERO_3,
        Plan(),
        ["deepspeed_config.offload_param_device", "deepspeed_config.offload_param_nvme_path"],
    ),
    (
        deepspeed(gradient_clipping=1.0),
        {"strategy": "deepspeed"},
        Plan(deepspeed=DeepSpeedConfig(settings={"gradient_clipping": 1.0})),
        [],
    ),
    (
        deepspeed(gradient_clipping="auto"),
        {"strategy": "deepspeed"},
        Plan(),
        ["deepspeed_config.gradient_clipping"],
    ),
    (
        deepspeed(deepspeed_config_file="ds.json"),
        {"strategy": "deepspeed"},
        Plan(deepspeed=DeepSpeedConfig(settings="ds.json")),
        [],
    ),
    (
        deepspeed(deepspeed_multinode_launcher="pdsh", deepspeed_hostfile="hosts"),
        {"strategy": "deepspeed"},
        Plan(),
        [
            "deepspeed_config.deepspeed_hostfile",
            "deepspeed_config.deepspeed_multinode_launcher",
        ],
    ),
    (dynamo(dynamo_backend="INDUCTOR", dynamo_mode="default"), {}, Plan(compile="whole"), []),
    (
        dynamo(dynamo_backend="INDUCTOR", dynamo_use_regional_compilation=True),
        {},
        Plan(compile="units"),
        [],
    ),
    (dynamo(dynamo_backend="NO", dynamo_use_regional_compilation=True), {}, Plan(), []),
    (
        dynamo(dynamo_backend="EAGER", dynamo_use_regional_compilation=True),
        {},
        Plan(compile=Compile("units", backend="eager")),
        [],
    ),
    (
        dynamo(dynamo_backend="INDUCTOR", dynamo_mode="max-autotune"),
        {},
        Plan(compile=Compile(mode="max-autotune")),
        [],
    ),
    ({"distributed_type": "NO", "dynamo_backend": "INDUCTOR"}, {}, Plan(compile="whole"), []),
]


@pytest.mark.parametrize(("config", "values", "plan", "unsupported"), EQUALS, ids=str)
def test_every_setting_of_accelerate_with_an_equal_is_converted(config, values, plan, unsupported):
    imported = from_accelerate(config)
    config = resolve({key: value for key, value in imported.values.items() if key != "nproc"})
    assert (config.plan or Plan()) == plan
    fields = {key: value for key, value in imported.values.items() if key not in ("nproc", "plan")}
    assert fields == values
    assert sorted(imported.without_equivalent) == unsupported


@pytest.mark.parametrize(
    "values",
    [
        {"num_processes": "many"},
        {"num_processes": 5, "num_machines": 2},
        {"num_processes": -2},
        {"num_processes": 2.5},
        {"num_machines": -1},
        {"fsdp_config": True},
        {"deepspeed_config": "ds.json"},
        deepspeed(zero_stage="two"),
        {"parallelism_config": {"parallelism_config_tp_size": "two"}},
    ],
    ids=str,
)
def test_a_value_of_the_wrong_type_is_an_error_with_a_fix(values):
    with pytest.raises(ConfigError) as caught:
        from_accelerate({"distributed_type": "MULTI_GPU", **values})
    assert caught.value.fix


@pytest.fixture
def file(tmp_path):
    """Return a function that writes the user's file, and the environment in which it is found."""
    path = tmp_path / "config.yaml"
    env = {"FACCEL_CONFIG": str(path)}
    return lambda text: (path.write_text(text), path, env)[1:]


def nproc_of(env, *words):
    out = CliRunner(env=env).invoke(main, ["launch", "--print", "torchrun", *words, "x.py"])
    assert out.exit_code == 0, out.output
    return re.search(r"--nproc-per-node (\d+)", out.output)[1]


def test_the_launcher_reads_the_number_of_processes_from_the_file(file, tmp_path):
    path, env = file("nproc: 3\ndevice: cpu\n")
    assert nproc_of(env) == "3"
    assert nproc_of(env, "--nproc", "2") == "2"
    assert nproc_of(env, "--nproc", "auto") == "1"
    assert nproc_of({"FACCEL_CONFIG": ""}, "--config", str(path)) == "3"
    (tmp_path / "own.toml").write_text("[train.faccel]\nnproc = 4\ndevice = 'cpu'\n")
    assert nproc_of({"FACCEL_CONFIG": ""}, "--config", f"{tmp_path}/own.toml#train.faccel") == "4"
    assert faccel.init(str(path), env={}).config.device == "cpu"  # no field: nothing else uses it
    out = CliRunner(env=env).invoke(main, ["config", "show"])
    assert f"nproc = 3  (file {path}:1)" in out.output


@pytest.mark.parametrize("value", ["0", "-1", "many", "1.5", "true"])
def test_an_invalid_number_of_processes_in_the_file_is_an_error_with_its_line(file, value):
    path, env = file(f"device: cpu\nnproc: {value}\n")
    for words in (["config", "check", str(path)], ["launch", __file__]):
        out = CliRunner(env=env).invoke(main, words)
        assert out.exit_code in (1, 2)
        assert "`nproc` must be a number of processes" in out.output
        assert f"{path}:2" in out.output


# Where "dp_shard: 4" is: the file, and the line of the mesh.
MESHES = {
    "a.yaml": ("# comment\ndevice: cpu\nmesh: dp_shard=4\n", "", 3),
    "b.yaml": ("device: cpu\nmesh:\n  dp_shard: 4\n", "", 2),
    "a.toml": ('device = "cpu"\nmesh.dp_shard = 4\n', "", 2),
    "a.json": ('{"device": "cpu",\n "mesh": "dp_shard=4"}', "", 2),
    "b.json": ('{"device": "cpu", "mesh": "dp_shard=4"}', "", 1),
    "own.yaml": ("mesh: 3\nfaccel:\n  device: cpu\n  mesh: dp_shard=4\n", "#faccel", 4),
    "own.toml": ('mesh = 3\n[a.faccel]\ndevice = "cpu"\nmesh = "dp_shard=4"\n', "#a.faccel", 4),
}


@pytest.mark.parametrize("name", MESHES)
def test_a_mesh_that_does_not_fit_names_the_file_and_the_line(name, tmp_path):
    text, section, line = MESHES[name]
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        faccel.init(f"{path}{section}", env={})
    assert f"from the file {path}:{line}" in caught.value.got
    assert "`dp_shard=-1`" in caught.value.fix
    env = {"FACCEL_CONFIG": f"{path}{section}"}
    out = CliRunner(env=env).invoke(main, ["env"])
    assert (out.exit_code, f"{path}:{line}" in out.output) == (1, True)
    out = CliRunner(env=env).invoke(main, ["launch", "--nproc", "3", __file__])
    assert (out.exit_code, f"{path}:{line}" in out.output) == (2, True)
    path.write_text(path.read_text().replace("dp_shard=4", "dp_shard=-1").replace(" 4", " -1"))
    assert faccel.init(f"{path}{section}", env={}).mesh.spec.dp_shard == 1  # the fix


@pytest.mark.parametrize("axis", ["dp_replicate", "dp_shard", "cp", "tp", "pp"])
def test_a_mesh_of_minus_1_fits_any_world(axis):
    for world_size in range(1, 9):
        spec = faccel.MeshSpec.of({axis: -1}).fill(world_size)
        assert (getattr(spec, axis), spec.size) == (world_size, world_size)


# The text of a file -> a part of what `config check` reports; None is valid.
CHECKS = {
    "device: cpu\nnproc: 4\nmesh: dp_shard=4\n": None,
    "device: cpu\nnproc: 4\nmesh: dp_shard=8\n": None,  # two nodes
    "device: cpu\nnproc: 4\nmesh: dp_shard=-1,tp=2\n": None,
    "device: cpu\nmesh: dp_shard=4\n": None,
    "device: cpu\nnproc: 4\nmesh: dp_shard=6\n": ":3",
    "device: cpu\nmesh: ep=-1,dp_shard=2,cp=2\n": None,
    "device: gpu\n": ":1",
    "device: cpu\nstrategy: deepspeed\nmesh: tp=2\n": "deepspeed",
}
if not torch.accelerator.is_available():
    CHECKS["device: cuda\n"] = "no `cuda` device"
    CHECKS["seed: 1\ndevice: cuda:1\n"] = ":2"
if importlib.util.find_spec("deepspeed") is None:
    CHECKS["device: cpu\nstrategy: deepspeed\n"] = "deepspeed"


@pytest.mark.parametrize("text", CHECKS)
def test_check_tries_what_is_available(text, file):
    path, env = file(text)
    out = CliRunner(env=env).invoke(main, ["config", "check", str(path)])
    assert out.exit_code == (CHECKS[text] is not None), out.output
    expected = CHECKS[text] or ": valid"
    assert (f"{path}{expected}" if expected.startswith(":") else expected) in out.output


@pytest.mark.parametrize("pair", ["nproc=3", "nproc=x", "nproc=0"])
def test_set_refuses_a_number_of_processes_that_no_run_can_have(file, pair):
    path, env = file("mesh: dp_shard=4\nnproc: 2\n")
    before = path.read_text()
    out = CliRunner(env=env).invoke(main, ["config", "set", pair])
    assert (out.exit_code, path.read_text()) == (2, before)
    assert CliRunner(env=env).invoke(main, ["config", "set", "nproc=4"]).exit_code == 0
    assert path.read_text() == "mesh: dp_shard=4\nnproc: 4\n"


def test_a_file_of_accelerate_as_a_configuration_file_names_the_import(file):
    path, env = file(FILES["0.34"][0])
    fix = f"faccel config import {path} -o faccel.yaml"
    with pytest.raises(ConfigError) as caught:
        faccel.init(str(path), env={})
    assert fix in caught.value.fix
    for words in (
        ["launch", "--config", str(path), __file__],
        ["launch", __file__],
        ["config", "check", str(path)],
        ["env"],
    ):
        out = CliRunner(env=env).invoke(main, words)
        assert out.exit_code in (1, 2)
        assert fix in out.output, out.output
