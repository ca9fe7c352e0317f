"""Fields that set something in PyTorch for the whole process, until the context is closed."""

import os
import socket

import pytest
import torch

import faccel
from faccel.errors import ConfigError, WorldError
from faccel.runtime.devices import c10d_backend


def settings():
    return (
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.benchmark,
    )


WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    monkeypatch.delenv(WORKSPACE, raising=False)
    before = settings()
    yield
    assert settings() == before


@pytest.mark.parametrize("workspace", [None, ":16:8"])
def test_the_workspace_of_the_user_stays(workspace, monkeypatch):
    if workspace is not None:
        monkeypatch.setenv(WORKSPACE, workspace)
    with faccel.init(deterministic=True, device="cpu", env={}):
        assert os.environ[WORKSPACE] == (workspace or ":4096:8")
    assert os.environ.get(WORKSPACE) == workspace


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_matmul_precision_applies_until_the_context_is_closed(precision):
    with faccel.init(matmul_precision=precision, device="cpu", env={}):
        assert settings() == (precision, False, False)


def test_deterministic_raises_for_a_kernel_that_is_not():
    x = torch.ones(2, 2, requires_grad=True)
    with faccel.init(deterministic=True, device="cpu", env={}):
        assert settings() == ("highest", True, False)
        assert os.environ[WORKSPACE] == ":4096:8"
        with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
            torch.nn.functional.max_unpool1d(x, torch.zeros(2, 2, dtype=torch.long), 1)


def test_the_last_of_several_contexts_restores_the_settings():
    first = faccel.init(matmul_precision="high", device="cpu", env={})
    second = faccel.init(matmul_precision="high", device="cpu", env={})
    third = faccel.init(device="cpu", env={})
    for ctx in (first, third):
        faccel.shutdown(ctx)
        faccel.shutdown(ctx)
        assert torch.get_float32_matmul_precision() == "high"
    faccel.shutdown(second)


def test_contexts_that_contradict_each_other_are_an_error():
    with (
        faccel.init(matmul_precision="high", device="cpu", env={}),
        pytest.raises(ConfigError, match="settings of the process") as caught,
    ):
        faccel.init(matmul_precision="medium", device="cpu", env={})
    assert "matmul_precision=medium" in caught.value.got
    assert "matmul_precision=high" in caught.value.got


def test_the_backend_of_the_configuration_is_used_for_tensors_of_the_device():
    cuda = torch.device("cuda", 0)
    assert c10d_backend(cuda) == "cpu:gloo,cuda:nccl"
    assert c10d_backend(cuda, "gloo") == "cpu:gloo,cuda:gloo"
    assert c10d_backend(torch.device("cpu"), "gloo") == "gloo"
    with pytest.raises(ConfigError, match="`comm_backend` is not a backend of this PyTorch"):
        c10d_backend(cuda, "smoke-signals")


def test_a_process_that_does_not_start_is_an_error_after_the_start_timeout():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    # Without `start_timeout_s` the test would wait for an hour.
    with pytest.raises(WorldError, match="could not connect to the 2 processes"):
        faccel.init(env=env, device="cpu", start_timeout_s=1, timeout_s=3600)
