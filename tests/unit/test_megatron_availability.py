"""Without Megatron-core: what is missing, and how to install it."""

import os

import pytest

import faccel
from faccel.backends.megatron.availability import probe, problem_of_version
from faccel.errors import BackendError


@pytest.mark.skipif(probe(os.environ) is None, reason="megatron-core is installed")
def test_without_megatron_core_init_names_the_package_to_install():
    with pytest.raises(BackendError) as caught:
        faccel.init(env={}, strategy="megatron")
    assert str(caught.value) == (
        "the strategy `megatron` cannot run here. Got megatron-core is not installed.\n"
        'To fix: run `pip install "megatron-core>=0.16"`, or `pip install "faccel[megatron]"`.'
    )


@pytest.mark.parametrize("version", ["0.15.3", "0.9", "0", "nightly", "0.x.1"])
def test_an_older_version_is_refused(version):
    assert problem_of_version(version) == (
        f"megatron-core {version} is installed, and faccel needs >=0.16"
    )


@pytest.mark.parametrize("version", ["0.16.1", "0.16.0rc1", "0.19.2", "1.0"])
def test_a_newer_version_runs(version):
    assert problem_of_version(version) is None
