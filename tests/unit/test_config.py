"""`Config` and `resolve`: sources, precedence and error messages."""

import itertools
import json

import attrs
import pytest

from faccel.config import Config, config_fields
from faccel.config_file import ConfigFile
from faccel.config_sources import resolve
from faccel.errors import ConfigError
from faccel.mesh import MeshSpec
from faccel.plan import Plan
from faccel.plan_units import Compile


def test_every_field_has_a_default_and_its_source_is_default():
    config = resolve()
    assert config == Config()
    assert set(config.sources.values()) == {"default"}
    assert len(config.explain().splitlines()) == len(config_fields())


VALUES = {
    "mixed_precision": ("bf16", "bf16"),
    "grad_accum": ("4", 4),
    "seed": ("9", 9),
    "device": ("cpu", "cpu"),
    "mesh": ("dp_replicate=2", MeshSpec(dp_replicate=2)),
    "strategy": ("deepspeed", "deepspeed"),
    "zero": ("3", 3),
    "plan": ("units=Block", Plan(units="Block")),
    "cp_layout": ("head-tail", "head-tail"),
    "compile": ("units", Compile("units")),
    "device_placement": ("no", False),
    "matmul_precision": ("high", "high"),
    "deterministic": ("1", True),
    "comm_backend": ("gloo", "gloo"),
    "start_timeout_s": ("20", 20.0),
    "timeout_s": ("30", 30.0),
    "debug": ("1", True),
    "run_dir": ("out/runs", "out/runs"),
}


def test_every_field_can_come_from_the_environment_and_from_an_argument():
    assert set(VALUES) == {field.name for field in config_fields()}
    for name, (text, value) in VALUES.items():
        key = f"FACCEL_{name.upper()}"
        from_env = resolve(env={key: text, "HOME": "/"})
        assert getattr(from_env, name) == value
        assert from_env.sources[name].startswith(f"environment {key}, over default")
        from_argument = resolve(overrides={name: value})
        assert getattr(from_argument, name) == value
        assert from_argument.sources[name].startswith("argument, over default")


@pytest.mark.parametrize("name", VALUES)
def test_none_is_not_given_in_every_source_and_for_every_field(name):
    text, value = VALUES[name]
    file = ConfigFile("x.yaml", {name: None})
    assert Config(**{name: None}) == Config()
    for options in ({"config": {name: None}}, {"overrides": {name: None}}, {"file": file}):
        config = resolve(**options)
        assert (config, config.sources[name]) == (Config(), "default")
    for options in (
        {"config": {name: None}},
        {"overrides": {name: None}},
        {"config": Config(**{name: None})},
    ):
        plain = text if attrs.has(type(value)) else value
        flag = {"FACCEL_LAUNCH": json.dumps({name: plain})}
        for env in ({f"FACCEL_{name.upper()}": text}, flag):
            assert getattr(resolve(env=env, **options), name) == value
    with pytest.raises(ConfigError, match="`sed` is not a field"):  # a misspelled one still raises
        resolve(overrides={"sed": None})


@pytest.mark.parametrize("present", list(itertools.product([False, True], repeat=3)))
def test_the_strongest_source_wins_and_names_the_one_it_replaces(present):
    sources = [("environment FACCEL_SEED", 1), ("argument config", 2), ("argument", 3)]
    config = resolve(
        {"seed": 2} if present[1] else None,
        env={"FACCEL_SEED": "1"} if present[0] else {},
        overrides={"seed": 3} if present[2] else {},
    )
    chain = [("default", 0)] + [
        source for source, is_set in zip(sources, present, strict=True) if is_set
    ]
    assert config.seed == chain[-1][1]
    expected = (
        f"{chain[-1][0]}, over {chain[-2][0]} {chain[-2][1]}" if len(chain) > 1 else "default"
    )
    assert config.sources["seed"] == expected


def test_a_record_sets_the_fields_that_differ_from_the_defaults():
    config = resolve(Config(seed=5), env={"FACCEL_SEED": "1", "FACCEL_GRAD_ACCUM": "2"})
    assert (config.seed, config.grad_accum) == (5, 2)


def test_a_resolved_record_keeps_its_values_when_it_is_resolved_again():
    env = {"FACCEL_MIXED_PRECISION": "bf16", "FACCEL_SEED": "3"}
    first = resolve(env=env, overrides={"mixed_precision": "no"})
    again = resolve(first, env=env)
    assert (again.mixed_precision, again.seed) == ("no", 3)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: resolve(overrides={"grad_acum": 4}), ["`grad_acum`", "use `grad_accum`"]),
        (lambda: resolve({"mixed_precison": "bf16"}), ["use `mixed_precision`"]),
        (lambda: resolve(env={"FACCEL_SEEDS": "1"}), ["FACCEL_SEEDS", "use `FACCEL_SEED`"]),
        (lambda: resolve(env={"FACCEL_SEED": "one"}), ["FACCEL_SEED", "'one'"]),
        (lambda: resolve(env={"FACCEL_DEVICE_PLACEMENT": "maybe"}), ["'maybe'"]),
        (lambda: Config(mixed_precision="fp4"), ["`bf16`", "'fp4'"]),
        (lambda: Config(grad_accum=0), ["at least 1", "0"]),
        (lambda: Config(grad_accum=True), ["`grad_accum`", "True"]),
        (lambda: Config(grad_accum="4"), ["`grad_accum`", "'4'"]),
        (lambda: Config(timeout_s="soon"), ["`timeout_s`"]),
        (lambda: Config(device_placement="yes"), ["True or False"]),
        (lambda: Config(device=0), ["`device`"]),
        (lambda: Config(run_dir=""), ["`run_dir`"]),
        (lambda: Config(mesh="dp=2"), ["`dp`", "dp_replicate"]),
        (lambda: Config(mesh="dp_shard"), ["dp_shard=2,tp=2"]),
        (lambda: resolve("training.yaml"), ["faccel.Config(seed=1)"]),
    ],
)
def test_a_mistake_raises_with_the_name_the_value_and_a_fix(call, words):
    with pytest.raises(ConfigError) as error:
        call()
    assert all(word in str(error.value) for word in words), str(error.value)


def test_resolving_neither_reads_nor_writes_the_process_environment():
    import os

    os.environ["FACCEL_SEED"] = "77"
    try:
        before = dict(os.environ)
        assert resolve().seed == 0
        assert dict(os.environ) == before
    finally:
        del os.environ["FACCEL_SEED"]
