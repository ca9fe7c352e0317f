"""Models whose values Accelerate's hooks hold, as after `from_pretrained(device_map="auto")`."""

import pytest
import torch
from torch import nn

import faccel
from faccel.testing import fake_context, simulate

accelerate = pytest.importorskip("accelerate")


def net():
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))


def to_disk(model, folder):
    return accelerate.dispatch_model(
        model, {"0": "cpu", "1": "disk"}, main_device="cpu", offload_dir=folder
    )


OFFLOADS = {
    "dispatch_model": to_disk,
    "cpu_offload": lambda model, folder: accelerate.cpu_offload(model, "cpu"),
    "disk_offload": lambda model, folder: accelerate.disk_offload(model, folder, "cpu"),
}


@pytest.mark.parametrize("mesh", [None, "dp_shard=2"])
@pytest.mark.parametrize("name", OFFLOADS)
def test_an_offloaded_model_is_not_wrapped_with_new_values(tmp_path, name, mesh):
    def fn(ctx):
        model = OFFLOADS[name](net(), str(tmp_path / str(ctx.rank)))
        with pytest.raises(faccel.errors.ModelError, match="offloaded by Accelerate"):
            faccel.wrap(model, ctx)

    simulate(fn, 2, mesh=mesh)


def test_a_model_on_several_devices_is_not_moved_to_one():
    model = net()
    model.hf_device_map = {"0": 0, "1": 1}
    with pytest.raises(faccel.errors.ModelError, match="on several devices"):
        faccel.wrap(model, fake_context(0, 1))
    x = torch.ones(1, 4)
    kept = faccel.wrap(model, fake_context(0, 1), device_placement=False)
    assert torch.equal(kept(x), model(x))


def test_a_device_map_of_one_device_is_a_model_as_any_other():
    model, x = net(), torch.ones(1, 4)
    expected = model(x)
    model = accelerate.dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)
    assert torch.equal(faccel.wrap(model, fake_context(0, 1))(x), expected)
