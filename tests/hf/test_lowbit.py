"""Low-bit optimizers and quantized layers of torchao are saved and loaded bit for bit."""

import pytest
import torch
from torch import nn

import faccel
from faccel.testing import fake_context

pytest.importorskip("torchao", reason="torchao is not installed")
ONE = fake_context(0, 1)
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("name", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
def test_a_quantized_layer_comes_back(tmp_path, name):
    import torchao.quantization as ao

    nets = [nn.Linear(128, 128) for _ in range(2)]
    for net in nets:
        ao.quantize_(net, getattr(ao, name)())
    expected = nets[0].weight.dequantize()
    faccel.save({"net": nets[0]}, tmp_path, ONE, step=1)
    faccel.load({"net": nets[1]}, tmp_path, ONE)
    assert torch.equal(nets[1].weight.dequantize(), expected)
