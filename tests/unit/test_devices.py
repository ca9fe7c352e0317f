"""The table of device types: it is the only place that distinguishes them."""

import pathlib
import re

import pytest
import torch

import faccel
from faccel.context import Topology
from faccel.device_table import KINDS, DeviceKind, default_generator, kind_of, widest_dtype
from faccel.errors import DeviceError
from faccel.runtime.devices import c10d_backend, check_launched, choose_device
from faccel.training.precision import unscale_without_kernel

PACKAGE = pathlib.Path(faccel.__file__).parent
TWO = Topology(rank=1, world_size=2, local_rank=1, local_world_size=2, source="torchrun")
VALUES = {"finite": 3.0, "inf": torch.inf, "-inf": -torch.inf, "nan": torch.nan}


def test_only_the_table_distinguishes_device_types():
    pattern = re.compile(r"torch\.cuda\.|device.type ((==|!=) \"|in \(|not in \()|\"cuda\"")
    hits = []
    for path in PACKAGE.rglob("*.py"):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if pattern.search(line) and path.name != "device_table.py":
                hits.append(f"{path}:{number}: {line.strip()}")
    assert not hits, "\n".join(hits)


def test_the_table_has_the_device_types_that_differ_from_cuda():
    names = {"tpu", "xpu", "npu", "hpu", "mlu", "musa", "neuron", "rbln", "mps", "cpu", "cuda"}
    assert set(KINDS) == names
    # PrivateUse1 is a device type without a row, as a plugin of tomorrow is.
    assert kind_of(torch.device("privateuseone")) == DeviceKind()


def devices(kind):
    """The device of a type, if this build of PyTorch has the type."""
    try:
        return [torch.device(kind, 0)]
    except RuntimeError:
        return []


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"cpu"}))
def test_a_device_that_this_node_lacks_is_an_error_and_never_the_cpu(kind):
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None and accelerator.type == kind:
        pytest.skip("this node has it")
    with pytest.raises(DeviceError, match=f"no `{kind}` device") as error:
        faccel.init(env={}, device=kind)
    if not devices(kind):
        assert f"install `{KINDS[kind].package}`" in error.value.fix


def test_several_processes_use_the_library_that_c10d_registered():
    for kind in ("cuda", "xpu"):
        assert c10d_backend(torch.device(kind, 0)) == f"cpu:gloo,{kind}:{KINDS[kind].library}"
    for kind in ("mps", "meta"):  # gloo has none of its memory; the other has no library
        with pytest.raises(DeviceError, match=f"`{kind}` devices cannot communicate"):
            choose_device(faccel.Config(device=kind), TWO)


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_variable_of_the_launcher_is_an_error(kind):
    variable = KINDS[kind].launch_variable
    assert bool(variable) == (kind == "tpu")
    for device in devices(kind):
        check_launched(device, Topology(), {})
        check_launched(device, TWO, {variable: "localhost:1,localhost:2"})
        if not variable:
            check_launched(device, TWO, {})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("value", VALUES)
def test_unscaling_without_the_kernel_equals_the_kernel(value, dtype):
    def grads():
        generator = torch.Generator().manual_seed(0)
        tensors = [torch.randn(3, 2, generator=generator).to(dtype) * 100, torch.zeros(0).to(dtype)]
        return [*tensors, torch.tensor([2.0, VALUES[value]]).to(dtype)]

    expected, overflow, inverse = grads(), torch.zeros(()), torch.tensor(1 / 1024.0)
    torch._amp_foreach_non_finite_check_and_unscale_(expected, overflow, inverse)
    actual = grads()
    result = unscale_without_kernel(actual, inverse)
    assert (result.item(), result.dtype) == (overflow.item(), overflow.dtype)
    assert result.item() == (value != "finite")
    for tensor, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(tensor, other, equal_nan=True, rtol=1e-6, atol=0)
    assert unscale_without_kernel([torch.zeros(0)], inverse).item() == 0.0


def test_the_generator_and_the_widest_type_of_the_cpu():
    assert default_generator(torch.device("cpu")) is torch.default_generator
    assert widest_dtype(torch.device("cpu")) == torch.float64
    assert widest_dtype(torch.device("mps")) == torch.float32
