"""`init` and `shutdown` in one process: devices, environments, imports and errors."""

import os
import subprocess
import sys
from importlib import metadata

import pytest
import torch

import faccel
from faccel.errors import ConfigError, DeviceError, FaccelError, WorldError
from faccel.testing import fake_context

TORCHRUN = {
    "RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "1",
}


def test_init_and_shutdown_may_be_called_twice():
    with faccel.init(env={}) as first:
        second = faccel.init({"seed": 3}, env={})
        assert (first.world_size, second.world_size, second.config.seed) == (1, 1, 3)
        assert second.device == torch.device(
            torch.accelerator.current_accelerator(check_available=True) or "cpu"
        )
    faccel.shutdown(first)
    faccel.shutdown(second)


def test_init_works_after_a_failed_init():
    with pytest.raises(ConfigError):
        faccel.init(env={}, mesh="dp_replicate=2")
    with pytest.raises(FaccelError, match="`ep` must divide"):
        faccel.init(
            env={
                "RANK": "0",
                "WORLD_SIZE": "2",
                "LOCAL_RANK": "0",
                "LOCAL_WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": "1",
            },
            mesh="dp_replicate=2,ep=2",
        )
    assert faccel.init(env={}).world_size == 1


def test_an_exception_has_a_note_with_its_rank():
    with pytest.raises(KeyError) as error, fake_context(1, 2):
        raise KeyError("x")
    assert error.value.__notes__ == ["on rank 1 of 2"]


def test_a_single_process_has_no_device_mesh():
    with pytest.raises(WorldError, match="no device mesh"):
        _ = faccel.init(env={}).mesh.device_mesh


def test_a_missing_device_is_an_error():
    with pytest.raises(DeviceError, match="gpu0"):
        faccel.init(env={}, device="gpu0")
    if not torch.cuda.is_available():
        with pytest.raises(DeviceError, match="no `cuda`"):
            faccel.init(env={}, device="cuda")


def test_init_reads_the_environment_that_it_gets():
    before = dict(os.environ)
    assert faccel.init(env={"FACCEL_MIXED_PRECISION": "bf16"}).config.mixed_precision == "bf16"
    assert dict(os.environ) == before


def test_processes_that_cannot_connect_raise_within_the_timeout():
    with pytest.raises(
        WorldError, match=r"rank 1 could not connect to the 4 processes at 127\.0\.0\.1:1"
    ):
        faccel.init(env=TORCHRUN, timeout_s=1)
    assert faccel.init(env={}).world_size == 1


def run(*code):
    return subprocess.run(
        [sys.executable, *code],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def test_importing_faccel_and_its_help_import_no_torch():
    out = run(
        "-c",
        "import faccel, sys;"
        "print([m for m in ('torch', 'attrs', 'click', 'yaml') if m in sys.modules])",
    )
    assert (out.stdout, out.stderr) == ("[]\n", "")
    out = run("-X", "importtime", "-m", "faccel", "--help")
    assert "Usage: faccel" in out.stdout
    assert "torch" not in {line.rpartition("|")[2].strip() for line in out.stderr.splitlines()}


def test_reading_every_public_name_imports_nothing_heavy():
    code = (
        "import sys, faccel; [getattr(faccel, n) for n in faccel.__all__];"
        "print([m for m in ('tensordict', 'yaml', 'click', 'rich', 'cattrs', 'torch._dynamo')"
        " if m in sys.modules])"
    )
    out = run("-W", "error", "-c", code)
    assert (out.stdout, out.stderr) == ("[]\n", "")


def test_init_imports_no_strategy():
    code = (
        "import sys, faccel; faccel.init(env={});"
        "print([m for m in ('torch.distributed.tensor', 'torch.distributed.fsdp', 'tensordict',"
        " 'torch._dynamo') if m in sys.modules])"
    )
    assert run("-c", code).stdout == "[]\n"


def test_faccel_env_prints_the_source_of_each_value():
    from click.testing import CliRunner

    from faccel.cli.commands import main

    result = CliRunner().invoke(main, ["env", "--explain"], env={"FACCEL_GRAD_ACCUM": "8"})
    assert (
        "process  rank 0 of 1, local rank 0 of 1, node 0 of 1\nlauncher  single\n" in result.output
    )
    assert f"torch {metadata.version('torch')}" in result.output
    assert "grad_accum = 8  (environment FACCEL_GRAD_ACCUM, over default 1)" in result.output
    result = CliRunner().invoke(main, ["env"], env={"FACCEL_GRAD_ACUM": "8"})
    assert result.exit_code == 1
    assert "use `FACCEL_GRAD_ACCUM`" in result.output


def test_a_torch_device_is_accepted_and_an_empty_variable_counts_as_unset():
    ctx = faccel.init(env={"FACCEL_SEED": "", "FACCEL_DEVICE": ""}, device=torch.device("cpu"))
    assert (ctx.device.type, ctx.config.device, ctx.config.seed) == ("cpu", "cpu", 0)
    assert ctx.config.sources["seed"] == "default"


def test_a_configuration_by_keyword_is_an_error_with_the_right_call():
    with pytest.raises(ConfigError, match=r"faccel.init\(config\)"):
        faccel.init(env={}, config={"seed": 1})


def test_devices_that_cannot_communicate_raise_for_several_processes():
    with pytest.raises(DeviceError, match="mps"):
        faccel.init(env=TORCHRUN, device="mps")
