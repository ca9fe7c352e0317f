"""The plan as a field of the configuration: text, files, sources and contradictions."""

import pytest
import torch
from click.testing import CliRunner

import faccel
from faccel import Plan
from faccel.config_file import read
from faccel.config_format import FORMATS
from faccel.config_sources import resolve
from faccel.errors import ConfigError
from faccel.parallel import (
    ActivationCheckpointing,
    Compile,
    DdpConfig,
    DeepSpeedConfig,
    Fp8,
    FsdpConfig,
    PipelineConfig,
    PowerSgdConfig,
    TransformerEngineConfig,
)
from faccel.plan_values import plan_values, record_text, to_plan

PLANS = {
    "units=Block,activation_checkpoint=full,offload=true": Plan(
        units="Block", activation_checkpoint="full", offload=True
    ),
    "units=[Block,Head]": Plan(units=("Block", "Head")),
    "units=1000000": Plan(units=1_000_000),
    "activation_checkpoint=2": Plan(activation_checkpoint=2),
    "compile=units,activation_checkpoint.memory_budget=0.5": Plan(
        compile="units", activation_checkpoint=ActivationCheckpointing(memory_budget=0.5)
    ),
    "fsdp.reshard_after_forward=false,fsdp.prefetch=2": Plan(
        fsdp=FsdpConfig(reshard_after_forward=False, prefetch=2)
    ),
    "fsdp.ignored=[a.*,b.weight]": Plan(fsdp=FsdpConfig(ignored=("a.*", "b.weight"))),
    "ddp.comm_hook=powersgd,ddp.powersgd.rank=4": Plan(
        ddp=DdpConfig(comm_hook="powersgd", powersgd=PowerSgdConfig(rank=4))
    ),
    "tensor.blocks.*.up=colwise,tensor.blocks.*.down=rowwise": Plan(
        tensor={"blocks.*.up": "colwise", "blocks.*.down": "rowwise"}
    ),
    "pipeline.chain=[embed,blocks.*,head],pipeline.schedule=gpipe": Plan(
        pipeline=PipelineConfig(chain=("embed", "blocks.*", "head"), schedule="gpipe")
    ),
    "deepspeed.offload_optimizer=cpu,deepspeed.settings.zero_optimization.stage=2": Plan(
        deepspeed=DeepSpeedConfig(
            offload_optimizer="cpu", settings={"zero_optimization": {"stage": 2}}
        )
    ),
    "compile=units": Plan(compile=Compile("units")),
    "compile.mode=max-autotune,compile.fullgraph=true": Plan(
        compile=Compile("whole", mode="max-autotune", fullgraph=True)
    ),
    "compile.backend=eager,compile.dynamic=false": Plan(
        compile=Compile(backend="eager", dynamic=False)
    ),
    "compile.options.epilogue_fusion=true": Plan(
        compile=Compile(options={"epilogue_fusion": True})
    ),
    "fp8.backend=te,fp8.recipe=mxfp8": Plan(fp8=Fp8(backend="te", recipe="mxfp8")),
    "fp8.backend=te,fp8.recipe=delayed,fp8.te.amax_history=16,fp8.te.in_eval=false": Plan(
        fp8=Fp8(
            backend="te",
            recipe="delayed",
            te=TransformerEngineConfig(amax_history=16, in_eval=False),
        )
    ),
    "fp8.recipe=rowwise,fp8.skip=head": Plan(fp8=Fp8(recipe="rowwise", skip=("head",))),
}


@pytest.mark.parametrize(("text", "plan"), PLANS.items(), ids=PLANS)
def test_text_is_the_plan_of_its_fields(text, plan):
    assert to_plan(text) == plan
    assert to_plan(record_text(plan)) == plan


@pytest.mark.parametrize("suffix", [".yaml", ".toml", ".json"])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_a_file_is_the_plan_of_its_fields(plan, suffix, tmp_path):
    path = tmp_path / f"config{suffix}"
    path.write_text(FORMATS[suffix].dump({"seed": 1, "plan": plan_values(plan)}))
    assert resolve(file=read(str(path))).plan == plan


@pytest.mark.parametrize(
    ("value", "problem", "got"),
    [
        ("unit=Block", "`plan.unit` is not a field", "unit='Block'"),
        ("fsdp.prefetsch=1", "`plan.fsdp.prefetsch` is not a field", "prefetsch=1"),
        ("fsdp=1", "`plan` has an invalid value: `fsdp`", "of type int"),
        ("units=Block,Head", "`plan` must be entries `name=value`", "'Head'"),
        ("units=-1", "`plan` has an invalid value: `units`", "-1"),
        ("fp8.te.margn=1", "`plan.fp8.te.margn` is not a field", "margn=1"),
        ("fp8.te.margin=1", "`plan` has an invalid value: `te` has the options", "torchao"),
        ("offload=maybe", "`plan` has an invalid value: `offload`", "'maybe'"),
        ("compile=all", "`plan` has an invalid value: `compile`", "'all'"),
        ("pipeline.split=head", "`plan.pipeline` is incomplete", "chain"),
        ("fsdp.prefetch=1,fsdp.prefetch.x=1", "`plan` has two values for `prefetch`", "1 and"),
        ("units=Block,units=Head", "`plan` has two values for `units`", "'Block' and `units`"),
        ("fsdp.prefetch=1,fsdp.prefetch=1", "`plan` has two values for `prefetch`", "1 and"),
        ("units=[Block", "`plan` must be entries `name=value`", "'units=[Block'"),
        ("units=Block],offload=true", "`plan` must be entries `name=value`", "'units=Block]'"),
        ("units==Block", "`plan` must be entries `name=value`", "'units==Block'"),
        (3, "`plan` must be a `Plan`, a mapping or text", "int"),
    ],
)
def test_the_error_of_a_value_names_it(value, problem, got):
    with pytest.raises(ConfigError) as caught:
        resolve({"plan": value}, env={})
    assert caught.value.problem.startswith(problem)
    assert got in caught.value.got


def test_sources_from_weakest_to_strongest(tmp_path):
    path = tmp_path / "faccel.yaml"
    path.write_text("plan:\n  units: File\n")
    file = read(str(path))
    env = {"FACCEL_PLAN": "units=Variable"}
    flags = {**env, "FACCEL_LAUNCH": '{"plan": "units=Flag"}'}
    assert resolve(file=file).plan == Plan(units="File")
    assert resolve(file=file).sources["plan"].startswith(f"file {path}:1")
    assert resolve(file=file, env=env).plan == Plan(units="Variable")
    assert resolve(file=file, env=flags).plan == Plan(units="Flag")
    assert "plan = units=Flag  (flag --plan, over environment" in resolve(env=flags).explain()
    assert resolve({"plan": "units=Flag"}, env=flags).plan == Plan(units="Flag")
    with pytest.raises(ConfigError, match=r"the script and the launcher contradict .* `plan`"):
        resolve({"plan": "units=Argument"}, env=flags)


def net():
    return torch.nn.Sequential(torch.nn.Linear(2, 1))


def test_wrap_takes_the_plan_of_the_configuration():
    env = {"FACCEL_PLAN": "ddp.bucket_cap_mb=3"}
    own = Plan(ddp=DdpConfig(bucket_cap_mb=4))
    with faccel.init(env=env, device="cpu") as ctx:
        assert faccel.wrap(net(), ctx)._plan.ddp.bucket_cap_mb == 3
        assert faccel.wrap(net(), ctx, plan=own)._plan is own


def test_a_plan_of_wrap_may_not_contradict_the_launcher():
    env = {"FACCEL_LAUNCH": '{"plan": "ddp.bucket_cap_mb=3"}'}
    with faccel.init(env=env, device="cpu") as ctx:
        faccel.wrap(net(), ctx, plan=Plan(ddp=DdpConfig(bucket_cap_mb=3)))
        with pytest.raises(ConfigError, match="contradict each other about `plan`") as caught:
            faccel.wrap(net(), ctx, plan=Plan())
    assert "ddp.bucket_cap_mb=3" in caught.value.got


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("whole", Compile("whole")),
        ("units", Compile("units")),
        ("what=units,mode=max-autotune", Compile("units", mode="max-autotune")),
        ({"what": "units", "dynamic": True}, Compile("units", dynamic=True)),
        (Compile("units"), Compile("units")),
    ],
    ids=str,
)
def test_compile_is_a_field_of_the_configuration(value, expected):
    config = resolve({"compile": value})
    assert config.compile == expected
    assert resolve(env={"FACCEL_COMPILE": record_text(expected)}).compile == expected


@pytest.mark.filterwarnings("ignore")  # of the compiler's modules
def test_a_plan_without_compile_takes_that_of_the_configuration():
    env = {"FACCEL_PLAN": "units=Linear", "FACCEL_COMPILE": "what=units,backend=eager"}
    with faccel.init(env=env, device="cpu") as ctx:
        compiled = Compile("units", backend="eager")
        assert faccel.wrap(net(), ctx)._plan == Plan(units="Linear", compile=compiled)
        own = Plan(units="Linear", compile=Compile(backend="aot_eager"))
        assert faccel.wrap(net(), ctx, plan=own)._plan is own


@pytest.mark.filterwarnings("ignore")  # of the compiler's modules
def test_compile_of_a_plan_may_not_contradict_the_launcher():
    env = {"FACCEL_LAUNCH": '{"compile": "whole"}'}
    with faccel.init(env=env, device="cpu") as ctx:
        assert faccel.wrap(net(), ctx, plan=Plan(offload=False))._plan.compile == Compile()
        with pytest.raises(ConfigError, match="contradict each other about `compile`"):
            faccel.wrap(net(), ctx, plan=Plan(units="Linear", compile="units"))


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("all", "`compile` has an invalid value: `what`"),
        ("what=units,mod=x", "`compile.mod` is not a field of `Compile`"),
        ({"mode": "max-autotune", "options": {}}, "`compile` has an invalid value: `mode` and"),
        ({"fullgraph": 2}, "`compile` has an invalid value: `fullgraph`"),
        ({"options": 1}, "`compile` has an invalid value: `options`"),
        (3, "`compile` must be a `Compile`"),
    ],
    ids=str,
)
def test_the_error_of_compile_names_the_value(value, problem):
    with pytest.raises(ConfigError) as caught:
        resolve({"compile": value})
    assert caught.value.problem.startswith(problem)


def test_the_command_line_shows_the_plan():
    from faccel.cli.commands import main

    result = CliRunner().invoke(main, ["env", "--json"], env={"FACCEL_PLAN": "units=Block"})
    assert '"plan": {"value": {"units": "Block"}' in " ".join(result.output.split())
