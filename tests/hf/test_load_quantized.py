"""Models whose linear layers are loaded in 8 and 4 bits, against plain arithmetic."""

import os

import pytest
import torch
import transformers as hf
from torch import nn
from torch.nn.utils import prune

from faccel.checkpoint import export_model
from faccel.errors import BackendError, CheckpointError, ConfigError, DeviceError, ModelError
from faccel.inference import load_quantized, offload, on_meta, place
from faccel.testing import fake_context
from tests.hf import models

# torchao warns at import about kernels for other hardware.
pytestmark = pytest.mark.filterwarnings("ignore")
CTX = fake_context(0, 1)
IDS = torch.tensor([[3, 7, 9, 4], [5, 5, 2, 8]])


def llama(*, tied=False, dtype=torch.float32):
    # The CPU kernels of bitsandbytes need multiples of 32 and 64.
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_key_value_heads": 2,
        "initializer_range": 0.1,
    }
    config = hf.LlamaConfig(**models.SIZE | models.WIDE | sizes, tie_word_embeddings=tied)
    return hf.LlamaForCausalLM(config).to(dtype).eval()


def exported(make, folder):
    torch.manual_seed(0)
    plain = make()
    export_model(plain, folder, CTX)
    with on_meta():
        empty = make()
    return plain, empty


def rows_in_int8(weight):
    """Return what is left of a weight after a symmetric rounding of each row to 255 values."""
    scale = weight.float().abs().amax(1, keepdim=True) / 127
    return scale * (weight.float() / scale).round(), scale


def with_weights(net, quantized, dequantized):
    """Return a plain model whose weights are those of the quantized one."""
    state = net.state_dict()
    for name in quantized.layers:
        state[f"{name}.weight"] = dequantized[name]
    net.load_state_dict(state)
    return net


def test_int8_rounds_each_row_symmetrically(tmp_path):
    pytest.importorskip("torchao", reason="torchao is not installed")
    plain, net = exported(llama, tmp_path)
    full = {name: param.detach().clone() for name, param in plain.named_parameters()}
    result = load_quantized(net, tmp_path, CTX)
    # 7 linear layers in each of 2 blocks.
    assert len(result.layers) == 14
    assert result.skipped == (("lm_head", "skipped"),)
    dequantized = {}
    for name in result.layers:
        weight = full[f"{name}.weight"]
        expected, scale = rows_in_int8(weight)
        dequantized[name] = net.get_submodule(name).weight.dequantize()
        # Half a step by rounding; the scale is rounded, too.
        assert ((dequantized[name] - weight).abs() <= 0.51 * scale).all(), name
        assert ((dequantized[name] - expected).abs() <= 1.01 * scale).all(), name
    with torch.no_grad():
        logits = net(IDS).logits
        torch.testing.assert_close(logits, plain(IDS).logits, atol=0.1, rtol=0)
        expected = with_weights(plain, result, dequantized)(IDS).logits
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
        generated = net.generate(IDS, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        assert torch.equal(
            generated, plain.generate(IDS, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        )
    # The others are as they were.
    assert torch.equal(net.lm_head.weight, full["lm_head.weight"])
    assert torch.equal(net.model.embed_tokens.weight, full["model.embed_tokens.weight"])


def layers_of_numbers():
    return nn.Sequential(nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 32, bias=False))


def test_the_memory_of_quantized_weights_is_counted(tmp_path):
    pytest.importorskip("torchao", reason="torchao is not installed")
    _, net = exported(layers_of_numbers, tmp_path)
    result = load_quantized(net, tmp_path, CTX, dtype=torch.bfloat16)
    # A byte for each weight; a scale in fp32 and a zero point of one byte for each row; the bias.
    assert result.num_bytes == 256 * 128 + 128 * 32 + 5 * (128 + 32) + 2 * 128
    assert "2 quantized layers, 37.92 KB in all" in str(result)
    assert net[0].bias.dtype == torch.bfloat16
    assert net(torch.ones(1, 256, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_layers_stay_the_same_objects_with_their_hooks(tmp_path):
    pytest.importorskip("torchao", reason="torchao is not installed")
    _, net = exported(layers_of_numbers, tmp_path)
    first, calls = net[0], []
    first.register_forward_hook(lambda *_: calls.append(1))
    load_quantized(net, tmp_path, CTX)
    net(torch.ones(1, 256))
    assert net[0] is first and calls == [1] and "extra_repr" not in vars(first)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.up = nn.Embedding(10, 16), nn.Linear(16, 16)
        self.out = nn.Linear(16, 10, bias=False)
        self.out.weight = self.embed.weight
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, ids):
        x = self.up(self.embed(ids))
        return self.out(self.attention(x, x, x)[0])


def test_tied_weights_and_subclasses_keep_their_dtype(tmp_path):
    pytest.importorskip("torchao", reason="torchao is not installed")
    plain, net = exported(Tied, tmp_path)
    result = load_quantized(net, tmp_path, CTX)
    assert result.layers == ("up",)
    assert dict(result.skipped) == {
        "out": "its weight is tied",
        "attention.out_proj": "a NonDynamicallyQuantizableLinear",
    }
    assert net.out.weight is net.embed.weight
    with torch.no_grad():
        torch.testing.assert_close(net(IDS), plain(IDS), atol=0.05, rtol=0)


def test_patterns_are_skipped_and_an_unknown_one_is_named(tmp_path):
    pytest.importorskip("torchao", reason="torchao is not installed")
    _, net = exported(llama, tmp_path)
    with pytest.raises(ConfigError, match=r"`model.layers.\*.attention` matches no module"):
        load_quantized(net, tmp_path, CTX, skip=["model.layers.*.attention"])
    for skip in ("lm_head", 3, ["lm_head", 3]):
        with pytest.raises(ConfigError, match=r"`skip` must be a list of names"):
            load_quantized(net, tmp_path, CTX, skip=skip)
    result = load_quantized(net, tmp_path, CTX, skip=["model.layers.*.self_attn"])
    # Patterns replace the default: now the output layer is quantized.
    assert len(result.layers) == 2 * 3 + 1 and "lm_head" in result.layers
    assert len(result.skipped) == 2 * 4


def test_a_model_without_a_layer_to_quantize_is_an_error(tmp_path):
    with pytest.raises(ModelError, match=r"no layer.*`lm_head`: skipped"):
        load_quantized(models.gpt2(), tmp_path, CTX)
    with pytest.raises(ModelError, match=r"a ReLU without `nn\.Linear`"):
        load_quantized(nn.ReLU(), tmp_path, CTX)


def test_an_error_leaves_the_model_unchanged(tmp_path):
    _, net = exported(layers_of_numbers, tmp_path)
    other = nn.Sequential(nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 8, bias=False))
    with pytest.raises(CheckpointError, match="of another shape"):
        load_quantized(other, tmp_path, CTX)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CheckpointError):
        load_quantized(net, tmp_path, CTX)
    assert all(param.is_meta for param in net.parameters())


def test_a_quantized_model_is_not_placed_or_quantized_again(tmp_path):
    pytest.importorskip("torchao", reason="torchao is not installed")
    _, net = exported(layers_of_numbers, tmp_path)
    load_quantized(net, tmp_path, CTX)
    for call in (
        lambda: place(net, tmp_path, CTX, budget={"cpu": "1GB"}),
        lambda: offload(net, "disk", CTX, folder=tmp_path),
        lambda: load_quantized(net, tmp_path, CTX),
    ):
        with pytest.raises(ModelError, match=r"`0.weight` is not an ordinary one.*Int8Tensor"):
            call()


def test_torchao_has_no_kernel_of_4_bits_on_the_cpu(tmp_path):
    pytest.importorskip("torchao", reason="torchao is not installed")
    _, net = exported(layers_of_numbers, tmp_path)
    with pytest.raises(
        DeviceError, match=r"of 4 bits for these layers on `cpu`(.|\n)*bitsandbytes"
    ):
        load_quantized(net, tmp_path, CTX, bits=4)
    assert all(param.is_meta for param in net.parameters())


def test_mistakes_are_named(tmp_path):
    net = layers_of_numbers()
    with pytest.raises(ConfigError, match="`bits` must be one of 4, 8"):
        load_quantized(net, tmp_path, CTX, bits=16)
    with pytest.raises(ConfigError, match="`library` must be one of"):
        load_quantized(net, tmp_path, CTX, library="bnb")
    with pytest.raises(ConfigError, match="swapped"):
        load_quantized(str(tmp_path), net, CTX)
    with pytest.raises(ModelError, match="`weight` is not an ordinary one"):
        load_quantized(nn.LazyLinear(3), tmp_path, CTX)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.complex64, "bf16", 3])
def test_a_dtype_in_which_models_do_not_compute_is_an_error(dtype, tmp_path):
    with pytest.raises(ConfigError, match="`dtype`"):
        load_quantized(layers_of_numbers(), tmp_path, CTX, dtype=dtype)


def is_missing(library):
    import importlib.util

    return importlib.util.find_spec(library) is None


@pytest.mark.skipif(not is_missing("bitsandbytes"), reason="bitsandbytes is installed")
def test_a_missing_library_is_named_with_what_installs_it(tmp_path):
    _, net = exported(layers_of_numbers, tmp_path)
    with pytest.raises(BackendError, match=r'pip install "faccel\[bnb\]"'):
        load_quantized(net, tmp_path, CTX, library="bitsandbytes")


class Computed(nn.Module):
    """Linear layers whose weights are computed before each forward."""

    def __init__(self):
        super().__init__()
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(32, 32))
        self.pruned = prune.l1_unstructured(nn.Linear(32, 32), "weight", 0.5)
        self.plain = nn.Linear(32, 32)

    def forward(self, x):
        return self.plain(self.pruned(self.normed(x)))


def test_layers_whose_weight_is_computed_keep_it(tmp_path):
    pytest.importorskip("torchao", reason="torchao is not installed")
    torch.manual_seed(0)
    plain, net = Computed(), Computed()
    export_model(plain, tmp_path, CTX)
    result = load_quantized(net, tmp_path, CTX)
    assert result.layers == ("plain",)
    assert dict(result.skipped) == {
        "normed": "a ParametrizedLinear",
        "pruned": "its weight is computed",
    }
    x = torch.linspace(-1, 1, 64).reshape(2, 32)
    torch.testing.assert_close(net(x), plain(x), atol=0.02, rtol=0)


@pytest.mark.parametrize(
    ("value", "dtype"),
    [(float("nan"), None), (float("-inf"), torch.bfloat16), (1e6, torch.float16)],
)
def test_a_weight_that_is_not_finite_is_not_rounded_to_numbers(value, dtype, tmp_path):
    pytest.importorskip("torchao", reason="torchao is not installed")
    plain = layers_of_numbers()
    with torch.no_grad():
        plain[2].weight[3, 5] = value
    export_model(plain, tmp_path, CTX)
    with on_meta():
        net = layers_of_numbers()
    with pytest.raises(CheckpointError, match=r"`2\.weight` has values that are not finite"):
        load_quantized(net, tmp_path, CTX, dtype=dtype)
    assert all(param.is_meta for param in net.parameters())


class Classifier(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.body = nn.Linear(32, 32)
        setattr(self, name, nn.Linear(32, 3))


@pytest.mark.parametrize("name", ["classifier", "score"])
def test_the_output_layer_of_a_classifier_keeps_its_dtype(name, tmp_path):
    pytest.importorskip("torchao", reason="torchao is not installed")
    _, net = exported(lambda: Classifier(name), tmp_path)
    assert load_quantized(net, tmp_path, CTX).skipped == ((name, "skipped"),)


def test_a_compiled_model_is_loaded_before_it_is_compiled(tmp_path):
    _, net = exported(layers_of_numbers, tmp_path)
    compiled = torch.compile(net, backend="eager")
    for call in (
        lambda: load_quantized(compiled, tmp_path, CTX),
        lambda: place(compiled, tmp_path, CTX, budget={"cpu": "1GB"}),
    ):
        with pytest.raises(ModelError, match=r"is compiled(.|\n)*first"):
            call()


def test_files_that_are_missing_are_named(tmp_path):
    net = layers_of_numbers()
    with pytest.raises(CheckpointError, match="Got no such file or folder"):
        load_quantized(net, tmp_path / "org" / "model", CTX)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="neither a folder nor a regular file"):
        load_quantized(net, tmp_path / "pipe", CTX)
    names = export_model(net, tmp_path, CTX, max_shard_size="20KB")
    os.remove(tmp_path / names[-1])
    with pytest.raises(CheckpointError, match=rf"Got `{names[-1]}` is missing"):
        load_quantized(net, tmp_path, CTX)
