"""A lock of a killed build of DeepSpeed's operators is an error; that of a running build is not."""

import os

import pytest

from faccel.backends.deepspeed.build_lock import check_lock, check_no_stale_lock, is_held_open
from faccel.errors import BackendError
from faccel.testing import fake_context

NAME = "cpu_adam"


@pytest.fixture
def lock(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    folder = tmp_path / NAME
    folder.mkdir()
    return folder / "lock"


def test_a_lock_that_no_process_holds_raises_with_its_folder(lock):
    check_no_stale_lock([NAME], fake_context(0, 1))
    lock.touch()
    check_no_stale_lock(["another_op"], fake_context(0, 1))
    with pytest.raises(BackendError, match="rm -r") as raised:
        check_no_stale_lock([NAME], fake_context(0, 1))
    assert str(lock) in str(raised.value)


def test_the_lock_of_a_running_build_is_waited_for(lock):
    descriptor = os.open(lock, os.O_CREAT | os.O_EXCL)  # as PyTorch does while it builds
    assert is_held_open(lock)
    check_no_stale_lock([NAME], fake_context(0, 1))
    os.close(descriptor)
    assert not is_held_open(lock)


def test_a_build_that_ends_during_the_check_is_no_error(tmp_path):
    check_lock(tmp_path / "removed" / "lock", fake_context(0, 1))
