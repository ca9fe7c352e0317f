"""`faccel config`, and configuration files of all versions of Accelerate."""

import os

import pytest
import yaml
from click.testing import CliRunner

from faccel.cli.commands import main
from faccel.errors import ConfigError
from faccel.launching.import_accelerate import from_accelerate


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
    assert f"seed = 3  (file {file}, over default 0)" in call("show").output
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
        {"mixed_precision": "fp16"},
        "--nproc 2",
        [],
    ),
    "0.12": (
        "compute_environment: LOCAL_MACHINE\ndeepspeed_config: {}\ndistributed_type: 'NO'\n"
        "downcast_bf16: 'no'\n"
        "fsdp_config: {}\nmachine_rank: 0\nmain_process_ip: null\nmain_process_port: null\n"
        "main_training_function: main\nmixed_precision: 'no'\nnum_machines: 1\n"
        "num_processes: 1\nuse_cpu: true\n",
        {"device": "cpu"},
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
        {"mixed_precision": "bf16", "device": "cpu", "debug": True},
        "--nproc 4 --nnodes 4 --node-rank 0 --main-address 127.0.0.1 --main-port 29500",
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
        {"grad_accum": 4},
        "--nproc 8 --nnodes 2 --rdzv-endpoint head:1234",
        [
            "deepspeed_config.zero_stage",
            "dynamo_config.dynamo_backend",
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
        {"mixed_precision": "bf16", "mesh": {"dp_replicate": 2, "dp_shard": 4}},
        "--nproc 8",
        ["fsdp_config.fsdp_reshard_after_forward", "fsdp_config.fsdp_version"],
    ),
}


@pytest.mark.parametrize("version", FILES)
def test_files_of_accelerate_are_imported(call, tmp_path, version):
    text, values, options, unsupported = FILES[version]
    source = tmp_path / "accelerate.yaml"
    source.write_text(text)
    out = call("import", str(source), "-o", str(tmp_path / "out.yaml"))
    assert out.exit_code == 0, out.output
    assert (yaml.safe_load((tmp_path / "out.yaml").read_text()) or {}) == values
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
        (
            {"distributed_type": "DEEPSPEED", "deepspeed_config": {}},
            {},
            "",
            {"distributed_type": "DEEPSPEED"},
        ),
        ({"distributed_type": "MEGATRON_LM"}, {}, "", {"distributed_type": "MEGATRON_LM"}),
        (
            {"distributed_type": "FSDP", "fsdp_config": {"fsdp_sharding_strategy": "NO_SHARD"}},
            {},
            "",
            {"fsdp_config.fsdp_sharding_strategy": "NO_SHARD"},
        ),
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
            {},
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
            {},
            "--nproc 4 --nnodes 2 --node-rank 0 --main-address h",
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


@pytest.mark.parametrize(
    "values",
    [
        {"num_processes": "many"},
        {"num_processes": 5, "num_machines": 2},
        {"fsdp_config": True},
        {"deepspeed_config": "ds.json"},
        {"parallelism_config": {"parallelism_config_tp_size": "two"}},
    ],
    ids=str,
)
def test_a_value_of_the_wrong_type_is_an_error_with_a_fix(values):
    with pytest.raises(ConfigError) as caught:
        from_accelerate({"distributed_type": "MULTI_GPU", **values})
    assert caught.value.fix
