"""`strategy="deepspeed"` raises before any process starts where DeepSpeed cannot run."""

import os
import pathlib
import subprocess
import sys

import pytest

import faccel
from faccel.backends.table import BACKENDS
from faccel.errors import BackendError, ConfigError
from faccel.testing import fake_context, simulate

ROOT = pathlib.Path(__file__).parents[2]
INIT = "import faccel; faccel.init(strategy='deepspeed')"


def init_error(tmp_path, version, **env):
    """Return the stderr of `init` in a process whose path starts with this version of DeepSpeed."""
    if version is not None:
        info = tmp_path / f"deepspeed-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: deepspeed\nVersion: {version}\n"
        )
    out = subprocess.run(
        [sys.executable, "-c", INIT],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", **env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert out.returncode == 1
    return out.stderr


@pytest.mark.slow
@pytest.mark.parametrize("version", ["0.17.5", "0.20.0", "1.19.0"])
def test_an_unsupported_version_of_deepspeed_is_an_error_with_the_pip_command(version, tmp_path):
    message = init_error(tmp_path, version)
    assert f"deepspeed {version} is installed" in message
    assert ">=0.19,<0.20" in message
    assert 'pip install --no-build-isolation "deepspeed>=0.19,<0.20"' in message


@pytest.mark.slow
def test_a_missing_compiler_for_deepspeed_is_an_error(tmp_path):
    message = init_error(tmp_path, "0.19.8", CXX="no-such-compiler")
    assert "`no-such-compiler` is not on the PATH" in message
    assert "apt install g++" in message


@pytest.mark.skipif(
    BACKENDS["deepspeed"].probe(os.environ) is None, reason="DeepSpeed is installed here"
)
def test_without_deepspeed_the_error_contains_the_pip_command():
    with pytest.raises(BackendError) as caught:
        faccel.init(strategy="deepspeed", device="cpu")
    assert caught.value.got == "deepspeed is not installed"
    assert 'pip install --no-build-isolation "deepspeed>=0.19,<0.20"' in caught.value.fix


def test_zero_without_deepspeed_and_an_unknown_strategy_are_errors():
    with pytest.raises(ConfigError, match="zero=2, from the environment FACCEL_ZERO"):
        faccel.init(env={"FACCEL_ZERO": "2"}, device="cpu")
    for wrong in ({"strategy": "deepsped"}, {"zero": 4}, {"zero": True}):
        with pytest.raises(ConfigError):
            faccel.Config(**wrong)


@pytest.mark.skipif(
    BACKENDS["deepspeed"].probe(os.environ) is not None, reason="DeepSpeed cannot run here"
)
def test_a_mesh_precision_or_simulation_unsupported_by_deepspeed_is_an_error():
    for mesh in ("dp_shard=2", "tp=2", "pp=2", "dp_replicate=2,tp=2"):
        with pytest.raises(BackendError, match="dp_replicate"):
            fake_context(
                0, 2 if "," not in mesh else 4, mesh=mesh, config={"strategy": "deepspeed"}
            )
    with pytest.raises(BackendError, match="mixed_precision=fp16 on a CPU"):
        faccel.init(strategy="deepspeed", mixed_precision="fp16", device="cpu")
    with pytest.raises(BackendError, match="threads"):
        simulate(
            lambda ctx: faccel.wrap(__import__("torch").nn.Linear(1, 1), ctx),
            2,
            config={"strategy": "deepspeed"},
        )
