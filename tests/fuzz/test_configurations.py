"""Configurations of every source: each is read, or refused with an error of faccel."""

import importlib
import json
import os
import pkgutil
import signal

import pytest
import torch
import yaml
from click.testing import CliRunner

import faccel
from faccel.cli.commands import main
from faccel.cli.output import fields_document
from faccel.config import LAUNCH, PRECISIONS, Config, config_fields
from faccel.config_file import read, read_accelerate
from faccel.config_sources import resolve
from faccel.errors import FaccelError
from faccel.launching.import_accelerate import from_accelerate
from faccel.launching.render import RENDERINGS
from faccel.mesh import MeshSpec
from faccel.runtime.detect import detect
from tests.fuzz import odd_values
from tests.fuzz.runs import Report, audited, cases
from tests.unit.test_detect import FAR, KUBEFLOW, LSF, MV2, OMPI, PMI, SLURM, TORCHRUN, TPU

MAX_MESSAGE = 8000  # characters
LIMIT_S = 20  # a case that takes longer blocks, or expands without end
LAUNCHERS = (TORCHRUN, SLURM, OMPI, OMPI | FAR, PMI, MV2, LSF, KUBEFLOW, TPU)
PRINTED = sorted(RENDERINGS)
ACCELERATE = {
    "compute_environment": ["LOCAL_MACHINE", "AMAZON_SAGEMAKER"],
    "distributed_type": ["NO", "MULTI_GPU", "MULTI_CPU", "FSDP", "DEEPSPEED", "MEGATRON_LM", "TPU"],
    "mixed_precision": ["no", "bf16", "fp16", "fp8", False],
    "num_processes": [1, 2, 8],
    "num_machines": [1, 2],
    "machine_rank": [0, 1],
    "main_process_ip": ["127.0.0.1", "head", None],
    "main_process_port": [29500, None],
    "rdzv_backend": ["static", "c10d"],
    "use_cpu": [True, False],
    "debug": [True, False],
    "fp16": [True, False],
    "gpu_ids": ["all", "0,1"],
    "dynamo_backend": ["INDUCTOR", "NO"],
    "dynamo_config": [{"dynamo_backend": "INDUCTOR", "dynamo_mode": "default"}, {}],
    "fsdp_config": [
        {"fsdp_version": 2, "fsdp_reshard_after_forward": True},
        {"fsdp_sharding_strategy": "HYBRID_SHARD", "fsdp_min_num_params": 1000},
        {"fsdp_transformer_layer_cls_to_wrap": "Block", "fsdp_forward_prefetch": True},
    ],
    "deepspeed_config": [
        {"gradient_accumulation_steps": 4, "zero_stage": 2, "gradient_clipping": 1.0},
        {"zero_stage": 3, "offload_param_device": "cpu"},
    ],
    "parallelism_config": [
        {"parallelism_config_tp_size": 2, "parallelism_config_dp_shard_size": 2}
    ],
}


def check_valid(config, given):
    """Compare a resolved configuration with what was given, and with the types of its fields."""
    assert config.mixed_precision in PRECISIONS
    for name, smallest in (("grad_accum", 1), ("seed", 0), ("timeout_s", 1)):
        assert type(getattr(config, name)) in (int, float) and getattr(config, name) >= smallest
    assert config.zero is None or config.zero in (0, 1, 2, 3)
    assert isinstance(config.mesh, MeshSpec | None) and isinstance(config.device, str | None)
    assert isinstance(config.run_dir, str) and config.run_dir
    assert {type(config.debug), type(config.device_placement)} == {bool}
    for name, value in given.items():
        is_record = name in ("mesh", "plan", "compile")
        is_plain = type(value) in (int, float, str, bool) and not is_record
        if is_plain and not (name == "mixed_precision" and value is False):
            assert getattr(config, name) == value, name
    assert len(config.explain().splitlines()) == len(config_fields())
    assert Config(**{name: getattr(config, name) for name in config.sources}) == config
    json.dumps(fields_document(config))


def from_file(draw, folder):
    mapping = odd_values.settings(draw)
    section = ""
    if draw.random() < 0.2:
        mapping = {"model": 3, "train": {"faccel": mapping}}
        section = draw.choice(["#train.faccel", "#train", "#train.facel", "#", "#..", "#model.x"])
    suffix, data = odd_values.document(draw, mapping)
    path = os.path.join(folder, f"config{suffix}")
    with open(path, "wb") as file:
        file.write(data)

    def call():
        content = read(path + section)
        config = resolve(file=content)
        check_valid(config, content.settings)
        with faccel.init(path + section, env={}) as ctx:
            assert ctx.config == config

    return call


def from_environment(draw, folder):
    env = dict(draw.choice([{}, {}, *LAUNCHERS]))
    for name in list(env):
        if draw.random() < 0.1:
            env[name] = str(draw.choice(odd_values.TEXTS))
        if draw.random() < 0.05:
            del env[name]
    for _ in range(draw.randrange(4)):
        field = odd_values.name(draw)
        env["FACCEL_" + field.upper()] = str(
            draw.choice(odd_values.FIELDS.get(field, [1]) + list(odd_values.TEXTS))
        )
    if draw.random() < 0.3:
        text = json.dumps(odd_values.settings(draw))
        env[LAUNCH] = odd_values.mutated(draw, text, odd_values.JSON_PARTS)
    overrides = odd_values.settings(draw) if draw.random() < 0.2 else {}

    def call():
        check_valid(resolve(env=env, overrides=overrides), overrides)
        topology = detect(env)
        assert 0 <= topology.rank < topology.world_size
        if topology.world_size == 1:
            with faccel.init(env=env, **overrides):
                pass

    return call


def from_arguments(draw, folder):
    mapping = odd_values.settings(draw, odd_values.value)
    if draw.random() < 0.1:
        mapping[odd_values.key(draw)] = odd_values.value(draw)
    if draw.random() < 0.1:
        field = draw.choice([*odd_values.FIELDS])
        mapping[field] = draw.choice([torch.ones(3), torch.tensor(1), torch.ones(2).numpy()])
    kind = draw.choice(["overrides", "config", "init", "record", "mesh"])

    def call():
        if kind == "overrides":
            check_valid(resolve(overrides=mapping), mapping)
        elif kind == "config":
            check_valid(resolve(mapping), mapping)
        elif kind == "mesh":
            MeshSpec.of(mapping).fill(4)
        elif kind == "record" and all(name in odd_values.FIELDS for name in mapping):
            check_valid(resolve(Config(**mapping)), mapping)
        else:
            with faccel.init(mapping, env={}) as ctx:
                check_valid(ctx.config, mapping)

    return call


def accelerate_mapping(draw):
    mapping = {}
    for name in draw.sample([*ACCELERATE], draw.randrange(1, 9)):
        mapping[name] = draw.choice(ACCELERATE[name])
        if draw.random() < 0.1:
            mapping[name] = odd_values.plain(draw)
        elif isinstance(mapping[name], dict) and draw.random() < 0.5:
            mapping[name] = {**mapping[name]}
            section = mapping[name]
            section[draw.choice([*section, odd_values.name(draw)])] = odd_values.plain(draw)
    return mapping


def from_accelerates_file(draw, folder):
    suffix, data = odd_values.document(draw, accelerate_mapping(draw))
    path = os.path.join(folder, f"accelerate{suffix}")
    with open(path, "wb") as file:
        file.write(data)

    def call():
        converted = from_accelerate(read_accelerate(path))
        resolve({name: value for name, value in converted.values.items() if name != "nproc"})
        assert not [option for option in converted.options if not option.isprintable()]

    return call


def command_line(draw, folder):
    """A command in a folder that has a file; it changes the file completely or not at all."""
    suffix, data = odd_values.document(
        draw, accelerate_mapping(draw) if draw.random() < 0.3 else odd_values.settings(draw)
    )
    path = os.path.join(folder, f"own{suffix}")
    with open(path, "wb") as file:
        file.write(data)
    flags = []
    for name in draw.sample([*odd_values.FIELDS, "nproc", "nnodes", "rdzv-endpoint"], 2):
        value = draw.choice([*odd_values.FIELDS.get(name, [1, 2]), *odd_values.TEXTS])
        flags.append(f"--{name.replace('_', '-')}={value}")
    pairs = [
        f"{odd_values.name(draw)}={draw.choice(odd_values.TEXTS)}",
        f"seed={draw.choice([1, 2])}",
    ]
    out = os.path.join(folder, draw.choice(["out.yaml", "out.toml", "out.json", "out"]))
    words = draw.choice(
        [
            ["launch", "--print", draw.choice(PRINTED), *flags, "x.py"],
            ["launch", "--print", "torchrun", "--config", path, "x.py"],
            ["config", "set", *pairs[draw.randrange(2) :]],
            ["config", "show", *draw.choice([[], ["--json"]])],
            ["config", "check", path, *draw.choice([[], ["--json"]])],
            ["config", "import", path, "-o", out, *draw.choice([[], ["--json"], ["--force"]])],
            ["config", "default", *draw.choice([[], ["--force"]])],
        ]
    )
    runner = CliRunner(env={"FACCEL_CONFIG": path})

    def call():
        result = runner.invoke(main, words)
        assert result.exception is None or isinstance(result.exception, SystemExit), words
        assert result.exit_code in (0, 1, 2), words
        assert len(result.output) < 30_000, words
        with open(path, "rb") as file:
            after = file.read()
        if result.exit_code or words[:2] not in (["config", "set"], ["config", "default"]):
            assert after == data, words
        else:
            read(path)  # valid
        if words[1] == "import" and os.path.exists(out):
            assert result.exit_code == 0, words
            resolve(file=read(out))
            os.unlink(out)
        assert set(os.listdir(folder)) <= {os.path.basename(path), "a.yaml", "config.yaml"} | {
            name for name in os.listdir(folder) if not name.startswith(".faccel-")
        }
        if result.exit_code:
            raise FaccelError("refused by the command line", got="x", fix="write something else")

    return call


SOURCES = (from_file, from_environment, from_arguments, from_accelerates_file, command_line)


def is_inside(folder, event, arguments):
    """Return whether an event changes a file in `folder` only."""
    paths = [item for item in arguments if isinstance(item, str) and os.sep in item]
    return event not in EXECUTED and all(path.startswith(folder) for path in paths)


EXECUTED = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "exec")


def warm_up(folder):
    """Import what is imported at the first use, so that no case imports anything."""
    repr(torch.ones(1))
    for module in pkgutil.iter_modules(faccel.backends.__path__, "faccel.backends."):
        importlib.import_module(module.name)
    resolve({"plan": "offload=true"})
    faccel.shutdown(faccel.init(env={}, run_dir=os.path.join(folder, "warm")))
    for suffix, text in ((".yaml", "seed: 1"), (".toml", "seed = 1"), (".json", '{"seed": 1}')):
        path = os.path.join(folder, f"warm{suffix}")
        with open(path, "w") as file:
            file.write(text)
        with faccel.init(path, env={}):
            pass
        for words in (
            ["config", "check", path],
            ["config", "check", path, "--json"],
            ["config", "import", path, "-o", path],
            ["config", "default", "--force"],
            ["config", "show"],
            ["launch", "--help"],
            *(["launch", "--print", to, "--nproc", "auto", path] for to in PRINTED),
        ):
            CliRunner(env={"FACCEL_CONFIG": path}).invoke(main, words)
        os.unlink(path)


def check_error(report, label, error):
    """Count the outcome of a case; an error must be short, printable and have a fix."""
    if error is None:
        report.count("valid")
        return
    if not isinstance(error, FaccelError):
        report.count("other errors")
        report.fail(label, "another error", error)
        return
    report.count("refused")
    text = str(error)
    if len(text) > MAX_MESSAGE or not error.fix:
        report.fail(label, f"a message of {len(text)} characters, or without a fix", error)
    if not all(line.isprintable() for line in text.split("\n")):
        report.fail(label, f"control characters in {text!r}")


@pytest.fixture
def limit():
    """End a case that blocks."""

    def fail(number, frame):
        raise AssertionError("the case took too long")

    previous = signal.signal(signal.SIGALRM, fail)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


def test_every_configuration_is_read_or_refused_with_an_error_of_faccel(
    tmp_path, monkeypatch, limit
):
    monkeypatch.chdir(tmp_path)
    folder = str(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", folder)  # for the socket of an observed run
    warm_up(folder)
    report = Report("configurations")
    for label, draw in cases("configurations", 200):
        source = draw.choice(SOURCES)
        call = source(draw, folder)
        signal.alarm(LIMIT_S)
        _, error, events = audited(call)
        signal.alarm(0)
        check_error(report, label, error)
        for event, arguments in events:
            # `run_dir` names the folder in which a rank writes its file.
            if ".faccel" in str(arguments[0]) and event not in EXECUTED:
                continue
            if event in EXECUTED or not is_inside(folder, event, arguments):
                report.fail(label, f"{event} {arguments!r}"[:300])
        for name in os.listdir(folder):
            if name.startswith((".faccel-", "PWNED")):
                report.fail(label, f"{source.__name__} left {name}")
                os.unlink(name)
    report.finish()


def test_the_payloads_would_be_executed_by_an_unsafe_parser(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yaml.unsafe_load(odd_values.PAYLOADS[0])
    assert (tmp_path / "PWNED").exists()
