"""Models whose linear layers are loaded by bitsandbytes, against plain arithmetic."""

import copy
import itertools
import tempfile
import types

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import faccel
from faccel.checkpoint import export_model
from faccel.errors import CheckpointError
from faccel.inference import load_quantized
from faccel.testing import simulate
from tests.hf.test_load_quantized import CTX, IDS, exported, layers_of_numbers, llama, with_weights

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")
X = torch.linspace(-1, 1, 3 * 256).reshape(3, 256)


def int8(layer):
    """Return the weight of a layer that has not run yet."""
    return layer.weight.CB.float() * layer.weight.SCB[:, None] / 127


def nf4(layer):
    return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


# LLM.int8 also rounds the activations, to 255 values; a kernel of NF4 rounds them to bfloat16, and
# the weights have 16 values. The logits are up to 2.4.
LIMITS = {8: (0.1, 0.1), 4: (0.05, 1.0)}


@pytest.mark.parametrize("bits", [8, 4])
def test_logits_are_those_of_the_dequantized_weights(bits, tmp_path):
    plain, net = exported(llama, tmp_path)
    result = load_quantized(net, tmp_path, CTX, bits=bits, library="bitsandbytes")
    assert len(result.layers) == 14 and result.skipped == (("lm_head", "skipped"),)
    dequantize = {8: int8, 4: nf4}[bits]
    dequantized = {name: dequantize(net.get_submodule(name)) for name in result.layers}
    to_dequantized, to_plain = LIMITS[bits]
    with torch.no_grad():
        logits = net(IDS).logits
        torch.testing.assert_close(logits, plain(IDS).logits, atol=to_plain, rtol=0)
        expected = with_weights(plain, result, dequantized)(IDS).logits
        torch.testing.assert_close(logits, expected, atol=to_dequantized, rtol=0)


def test_int8_rounds_each_row_to_half_a_step(tmp_path):
    plain, net = exported(layers_of_numbers, tmp_path)
    load_quantized(net, tmp_path, CTX, library="bitsandbytes")
    for index in (0, 2):
        weight = plain[index].weight.detach()
        scale = weight.abs().amax(1, keepdim=True) / 127
        # Half a step, and the rounding of the weight to fp16 before.
        assert ((int8(net[index]) - weight).abs() <= 0.51 * scale + weight.abs() / 1024).all()


def test_the_memory_of_quantized_weights_is_counted(tmp_path):
    _, net = exported(layers_of_numbers, tmp_path)
    result = load_quantized(net, tmp_path, CTX, library="bitsandbytes", dtype=torch.bfloat16)
    assert result.num_bytes == 256 * 128 + 128 * 32 + 4 * (128 + 32) + 2 * 128
    _, net = exported(layers_of_numbers, tmp_path)
    result = load_quantized(net, tmp_path, CTX, bits=4, library="bitsandbytes")
    # Half a byte for each weight, a byte for 64 of them, a scale for 256 of those; the bias.
    first, second = 256 * 128, 128 * 32
    scales = first // 64 + second // 64 + 4 * (first // 64 // 256 + 1)
    assert result.num_bytes == (first + second) // 2 + scales + 4 * 128


@pytest.mark.parametrize("bits", [8, 4])
def test_layers_stay_the_same_objects_with_their_hooks(bits, tmp_path):
    _, net = exported(layers_of_numbers, tmp_path)
    first, calls = net[0], []
    first.register_forward_hook(lambda *_: calls.append(1))
    load_quantized(net, tmp_path, CTX, bits=bits, library="bitsandbytes")
    expected = net(X)
    assert net[0] is first and calls == [1]
    assert torch.equal(copy.deepcopy(net)(X), expected)


def test_a_state_dict_of_8_bits_loads_with_its_scales(tmp_path):
    nets = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        export_model(layers_of_numbers(), tmp_path, CTX)
        nets.append(layers_of_numbers())
        load_quantized(nets[seed], tmp_path, CTX, library="bitsandbytes")
    first, second = nets
    second.load_state_dict(first.state_dict())
    assert torch.equal(second(X), first(X))


class WithAdapter(nn.Module):
    def __init__(self):
        super().__init__()
        self.base, self.adapter = layers_of_numbers(), nn.Linear(256, 32, bias=False)

    def forward(self, x):
        return self.base(x) + self.adapter(x)


def with_adapter(bits, seed):
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        export_model(layers_of_numbers(), folder, CTX)
        torch.manual_seed(seed)
        net = WithAdapter()
        load_quantized(net.base, folder, CTX, bits=bits, library="bitsandbytes")
    net.base.requires_grad_(False)
    return net.eval()


@pytest.mark.parametrize("bits", [8, 4])
def test_adapters_are_saved_and_loaded_before_and_after_a_forward(bits, tmp_path):
    # The first forward of a layer changes what it writes into its state.
    for runs_first in itertools.product([False, True], repeat=2):
        nets = [with_adapter(bits, seed) for seed in (1, 2)]
        for net, is_run in zip(nets, runs_first, strict=True):
            if is_run:
                net(X)
        path = tmp_path / str(runs_first)
        faccel.save({"net": nets[0]}, path, CTX, step=1, trained_only=True)
        faccel.load({"net": nets[1]}, path, CTX)
        assert torch.equal(nets[0].adapter.weight, nets[1].adapter.weight)
        tensors = load_file(next(path.rglob("*.safetensors")))
        assert list(tensors) == ["net/adapter.weight"]


def test_8_bits_are_saved_whole_and_4_bits_are_refused(tmp_path):
    nets = [with_adapter(8, seed) for seed in (1, 2)]
    expected = nets[0](X)
    faccel.save({"net": nets[0]}, tmp_path, CTX, step=1)
    faccel.load({"net": nets[1]}, tmp_path, CTX)
    assert torch.equal(nets[1](X), expected)
    with pytest.raises(CheckpointError, match=r"net/base\.\d\.weight` could not be loaded again"):
        faccel.save({"net": with_adapter(4, 1)}, tmp_path, CTX, step=2)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_weights_are_exported_only_with_their_description(bits, tmp_path):
    net = with_adapter(bits, 1)
    with pytest.raises(CheckpointError, match=r"`base.0.+no `quantization_config`"):
        export_model(net, tmp_path, CTX)
    assert not list(tmp_path.iterdir())
    assert export_model(net, tmp_path, CTX, trained_only=True) == ["model.safetensors"]
    # As of a model that transformers has quantized.
    net.config = types.SimpleNamespace(quantization_config={"load_in_8bit": True})
    export_model(net, tmp_path, CTX)
    assert "base.0.weight" in load_file(tmp_path / "model.safetensors")


@pytest.mark.parametrize("bits", [8, 4])
def test_adapters_on_two_replicas_train_as_on_one_process(bits):
    x = torch.linspace(-1, 1, 4 * 256).reshape(4, 256)

    def train(ctx):
        model = faccel.wrap(with_adapter(bits, 1).train(), ctx)
        opt = faccel.wrap_optimizer(torch.optim.SGD([model.module.adapter.weight], 0.1), model, ctx)
        scaler = faccel.init_scaler(ctx)
        for _ in range(2):
            loss = model(faccel.split(x, ctx)).square().mean()
            scaler = faccel.scaled_backward(loss, scaler, ctx)
            _, scaler = faccel.optimizer_step(opt, scaler, ctx)
        return model.module.adapter.weight.detach()

    (one,) = simulate(train, 1)
    assert not torch.equal(one, with_adapter(bits, 1).adapter.weight)
    for weight in simulate(train, 2):
        torch.testing.assert_close(weight, one, atol=1e-6, rtol=1e-5)
