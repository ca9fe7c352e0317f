"""The source of a value: files, environment, launcher flags and arguments, in any combination."""

import itertools
import json
import random

import pytest
from click.testing import CliRunner

import faccel
from faccel.cli.commands import main
from faccel.config import LAUNCH, config_fields, flag_of
from faccel.config_file import ConfigFile, default_path, find, read
from faccel.config_sources import resolve
from faccel.errors import ConfigError
from tests.unit.test_config import VALUES

SOURCES = ("file", "environment", "flag", "config", "argument")
OTHERS = {
    "mixed_precision": ["no", "bf16", "fp16", "fp8", "bf16-true", "fp16-true"],
    "grad_accum": [2, 3, 4, 5, 6],
    "seed": [1, 2, 3, 4, 5],
    "device": ["cpu", "cuda", "cuda:1", "mps", "xpu"],
    "mesh": ["dp_replicate=2", "tp=2", "dp_shard=3", "dp_shard=4", "pp=2"],
    "strategy": ["deepspeed"],
    "zero": [0, 1, 2, 3],
    "plan": ["units=A", "units=B", "offload=true", "fsdp.prefetch=1", "compile=whole"],
    "cp_layout": ["contiguous", "head-tail"],
    "compile": ["whole", "units", "mode=max-autotune", "dynamic=true", "backend=eager"],
    "device_placement": [True, False],
    "debug": [True, False],
    "matmul_precision": ["highest", "high", "medium"],
    "deterministic": [True, False],
    "comm_backend": ["gloo", "nccl", "ucc", "mpi", "x"],
    "start_timeout_s": [10.0, 20.0, 30.0],
    "timeout_s": [10.0, 20.0, 30.0, 40.0, 50.0],
    "run_dir": ["a", "b", "c", "d", "e"],
}


def words(name, value):
    """As it is written in the environment."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def merge(name, values):
    env = {}
    if "environment" in values:
        env[f"FACCEL_{name.upper()}"] = words(name, values["environment"])
    if "flag" in values:
        env[LAUNCH] = json.dumps({name: values["flag"]})
    return resolve(
        {name: values["config"]} if "config" in values else None,
        env=env,
        overrides={name: values["argument"]} if "argument" in values else None,
        file=ConfigFile("x.yaml", {name: values["file"]} if "file" in values else {}),
    )


@pytest.mark.parametrize("name", [field.name for field in config_fields()])
def test_the_strongest_of_any_subset_of_sources_wins_and_each_is_named(name):
    assert set(OTHERS) == {field.name for field in config_fields()} == set(VALUES)
    draw = random.Random(name)
    for size in range(len(SOURCES) + 1):
        for subset in itertools.combinations(SOURCES, size):
            values = {source: draw.choice(OTHERS[name]) for source in subset}
            inside = [values[source] for source in ("config", "argument") if source in values]
            if "flag" in values and any(value != values["flag"] for value in inside):
                with pytest.raises(ConfigError, match="contradict") as caught:
                    merge(name, values)
                assert flag_of(name) in caught.value.got
                continue
            config = merge(name, values)
            if not subset:
                assert config.sources[name] == "default"
                continue
            expected = getattr(faccel.Config(**{name: values[subset[-1]]}), name)
            assert getattr(config, name) == expected
            source = config.sources[name]
            expected_source = {
                "file": "file x.yaml",
                "environment": f"environment FACCEL_{name.upper()}",
                "flag": flag_of(name),
                "config": "argument config",
                "argument": "argument",
            }
            assert expected_source[subset[-1]] in source
            assert ", over " in source


FILES = {
    "a.yaml": "seed: 3\nmesh: {dp_replicate: 2}\nfaccel: {seed: 4}\ndeep: {er: {seed: 5}}\n",
    "a.yml": "seed: 3\nmesh: dp_replicate=2\n",
    "a.toml": 'seed = 3\nmesh = "dp_replicate=2"\n',
    "a.json": '{"seed": 3, "mesh": {"dp_replicate": 2}}',
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_yaml_toml_or_json(tmp_path, name):
    (tmp_path / name).write_text(FILES[name])
    values = {k: v for k, v in read(str(tmp_path / name)).values.items() if k in ("seed", "mesh")}
    config = resolve(file=ConfigFile(name, values))
    assert (config.seed, config.mesh.dp_replicate) == (3, 2)


def test_a_section_of_the_users_own_file(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(FILES["a.yaml"])
    assert faccel.init(f"{path}#faccel", env={}).config.seed == 4
    assert read(f"{path}#deep.er").values == {"seed": 5}
    with pytest.raises(ConfigError, match="`faccel`"):
        read(f"{path}#facel")
    assert faccel.init(f"{path}#faccel", env={"FACCEL_SEED": "9"}).config.explain().splitlines()[
        2
    ] == (f"seed = 9  (environment FACCEL_SEED, over file {path}:3 4)")


BAD = {
    "is not a mapping": ("a.yaml", "- 1\n"),
    "is not YAML": ("a.yaml", "a: [1\n"),
    "is not TOML": ("a.toml", "a = \n"),
    "is not JSON": ("a.json", "{"),
    "must end with one of": ("a.ini", ""),
    "`grad_accum`": ("a.yaml", "grad_acum: 2\n"),
    "at least 0. Got seed=-1, from the file": ("a.yaml", "seed: -1\n"),
    "True or False. Got 'maybe', from the file": ("a.yaml", "debug: maybe\n"),
    "from the file": ("a.yaml", "mesh: {dp: 2}\n"),
}


@pytest.mark.parametrize("what", BAD)
def test_an_error_in_a_file_names_the_file(tmp_path, what):
    name, text = BAD[what]
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        faccel.init(str(path), env={})
    assert what in str(caught.value)
    assert name in str(caught.value)


def test_configuration_files_are_found_in_each_documented_place(tmp_path):
    assert find({}) is None
    assert default_path({}) is None
    assert find({"HOME": str(tmp_path)}) is None
    user_file = tmp_path / ".config" / "faccel" / "config.yaml"
    user_file.parent.mkdir(parents=True)
    user_file.write_text("seed: 11\n")
    assert find({"HOME": str(tmp_path)}) == str(user_file)
    assert find({"HOME": "/x", "XDG_CONFIG_HOME": str(tmp_path / ".config")}) == str(user_file)
    assert find({"HOME": str(tmp_path), "FACCEL_CONFIG": "b.yaml"}) == "b.yaml"
    assert faccel.init(env={"HOME": str(tmp_path)}).config.seed == 11
    with pytest.raises(ConfigError, match=r"b\.yaml"):
        faccel.init(env={"FACCEL_CONFIG": "b.yaml"})


def test_every_field_is_a_flag_of_the_launcher():
    out = CliRunner().invoke(main, ["launch", "--help"]).output
    for field in config_fields():
        assert flag_of(field.name) in out
        assert field.metadata["doc"].split()[0] in out


def test_impossible_values_of_fields_are_errors(tmp_path):
    for values in ({"timeout_s": float("nan")}, {"timeout_s": float("inf")}, {"mesh": [1, 2]}):
        with pytest.raises(ConfigError):
            resolve(values)
    with pytest.raises(ConfigError, match="must be a JSON object"):
        resolve(env={"FACCEL_LAUNCH": "x"})
    (tmp_path / "a.yaml").write_text("mixed_precision: no\n")  # YAML 1.1 reads False
    assert resolve(file=read(str(tmp_path / "a.yaml"))).mixed_precision == "no"
    env = {"FACCEL_LAUNCH": '{"config": "/b.yaml"}'}
    with pytest.raises(ConfigError, match="different configuration files"):
        faccel.init(str(tmp_path / "a.yaml"), env=env)
    env = {"FACCEL_LAUNCH": '{"config": "%s"}' % (tmp_path / "a.yaml")}
    faccel.shutdown(faccel.init(str(tmp_path / "a.yaml"), env=env))
