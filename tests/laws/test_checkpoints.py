"""The round-trip law: what `save` and `export_model` commit loads bit for bit, all else raises.

The expected values are those that were saved, copied before. A tensor goes through every position
of a state; a model and an optimizer go from every layout to every other.
"""

import itertools
import operator

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import faccel
from faccel.errors import CheckpointError
from faccel.testing import fake_context, simulate

ONE = fake_context(0, 1)


class Scaled(torch.Tensor):
    """A quantized tensor: codes and one scale, as the classes of torchao are built."""

    @staticmethod
    def __new__(cls, codes, scale, zero=0):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes, scale, zero=0):
        self.codes, self.scale, self.zero = codes, scale, zero

    def __tensor_flatten__(self):
        return ["codes", "scale"], {"zero": self.zero}

    @classmethod
    def __tensor_unflatten__(cls, inner, context, size, stride):
        return cls(inner["codes"], inner["scale"], context["zero"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].codes, args[0].scale, args[0].zero)
        if func is torch.ops.aten.copy_.default:
            args[0].codes.copy_(args[1].codes)
            args[0].scale.copy_(args[1].scale)
            return args[0]
        raise NotImplementedError(func)

    def __repr__(self, **kwargs):
        return f"Scaled({self.codes}, {self.scale}, {self.zero})"


class Unregistered(Scaled):
    """A quantized tensor whose class is unknown when its values are loaded without a target."""


class Opaque(torch.Tensor):
    """A tensor without memory and without the protocol that names its parts."""

    @staticmethod
    def __new__(cls):
        return torch.Tensor._make_wrapper_subclass(cls, (2,))

    __torch_dispatch__ = classmethod(lambda cls, func, types, args=(), kwargs=None: args[0])

    def __repr__(self, **kwargs):
        return "Opaque"


@pytest.fixture(autouse=True)
def registered():
    with torch.serialization.safe_globals([Scaled]):
        yield


def quantized(cls=Scaled, offset=0):
    codes = torch.arange(6, dtype=torch.int8).view(2, 3) + offset
    return cls(codes, torch.tensor([0.5 + offset]), 3)


def integers(dtype):
    return lambda: torch.tensor([[1, 0, 3], [4, 5, 7]]).to(dtype)


def randoms(dtype):
    return lambda: torch.randn(2, 3, dtype=dtype, generator=torch.Generator().manual_seed(0))


FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
COMPLEX = (torch.complex32, torch.complex64, torch.complex128)
LOW = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
       torch.float8_e8m0fnu)  # fmt: skip
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32,
            torch.uint16, torch.uint8, torch.bool)  # fmt: skip
STORED = {
    **{str(dtype): randoms(dtype) for dtype in FLOATS + COMPLEX},
    **{str(dtype): integers(dtype) for dtype in LOW + INTEGERS},
    "not finite": lambda: torch.tensor([float("nan"), float("inf"), -0.0]),
    "empty": lambda: torch.empty(0, 3),
    "0-d": lambda: torch.tensor(2.5),
    "0-d complex": lambda: torch.tensor(2.5 + 1j),
    "transposed": lambda: torch.arange(6.0).view(2, 3).T,
    "channels last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "a slice": lambda: torch.arange(12.0)[2:10:3],
    "of a gradient": lambda: torch.ones(2, requires_grad=True) * 2,
    "quantized": quantized,
}
LAZY = {
    "conjugate": lambda: torch.tensor([1 + 2j, 3 - 1j]).conj(),
    "negative": lambda: torch.tensor([1 + 2j]).conj().imag,
    "expanded": lambda: torch.ones(1, 3).expand(2, 3),
}
REFUSED = {
    "meta": lambda: torch.ones(2, device="meta"),
    "sparse": lambda: torch.eye(2).to_sparse(),
    "sparse rows": lambda: torch.eye(2).to_sparse_csr(),
    "quantized by torch": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "opaque": Opaque,
}


class Holder(nn.Module):
    def __init__(self, tensor):
        super().__init__()
        self.register_buffer("x", tensor)


class Stateful:
    def __init__(self, tensor):
        self.x = tensor

    def state_dict(self):
        return {"x": self.x}

    def load_state_dict(self, state):
        self.x = state["x"]


def optimizer(tensor):
    net = nn.Linear(3, 2)
    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    opt.state[net.weight] = {"x": tensor}
    return {"net": net, "opt": opt}


def zeroed(tensor):
    """Return another tensor of the same type, as a program has before it loads."""
    if isinstance(tensor, Scaled):
        return quantized(type(tensor), offset=9)
    return torch.zeros_like(tensor.detach())


# How a tensor gets into a state, the state of the loading program, and how it gets the tensor.
POSITIONS = {
    "a value": (lambda x: {"x": x}, lambda x: {"x": None}, operator.itemgetter("x")),
    "a value over one": (lambda x: {"x": x}, lambda x: {"x": x}, operator.itemgetter("x")),
    "an item": (lambda x: [(x,)], lambda x: [(x,)], lambda state: state[0][0]),
    "a buffer": (Holder, lambda x: Holder(zeroed(x)), lambda net: net.x),
    "an object": (Stateful, lambda x: Stateful(None), lambda value: value.x),
    "a state of an optimizer": (
        optimizer,
        lambda x: optimizer(torch.zeros(())),
        lambda state: state["opt"].state[state["net"].weight]["x"],
    ),
}


def bits(tensor):
    """Return class, dtype, shape and bytes of a tensor."""
    if isinstance(tensor, Scaled):
        return type(tensor), tensor.zero, bits(tensor.codes), bits(tensor.scale)
    tensor = tensor.detach().resolve_conj().resolve_neg()
    if tensor.is_complex():
        real = torch.view_as_real(tensor)
        return tensor.dtype, bits(real)
    raw = tensor.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)
    return tensor.dtype, tensor.shape, bytes(raw.tolist())


def check_round_trip(tensor, position, path):
    put, target, get = POSITIONS[position]
    expected = bits(tensor)
    faccel.save(put(tensor), path, ONE, step=1)
    assert bits(tensor) == expected
    assert bits(get(faccel.load(target(tensor), path, ONE))) == expected


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("name", [*STORED, *LAZY])
def test_a_tensor_comes_back_bit_for_bit(tmp_path, name, position):
    tensor = (STORED | LAZY)[name]()
    if position == "a buffer" and name == "expanded":
        with pytest.raises(CheckpointError, match="`x` cannot be loaded again"):
            check_round_trip(tensor, position, tmp_path)
    else:
        check_round_trip(tensor, position, tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("background", [False, True])
def test_a_tensor_that_cannot_be_loaded_is_refused_by_the_save(
    tmp_path, name, position, background
):
    put, _, _ = POSITIONS[position]
    state = put(REFUSED[name]())
    with pytest.raises(CheckpointError, match=" cannot be stored"):
        faccel.save(state, tmp_path, ONE, step=1, background=background)
    assert faccel.latest(tmp_path, ONE) is None
    if position == "a buffer":
        with pytest.raises(CheckpointError, match="`x` cannot be stored"):
            faccel.checkpoint.export_model(state, tmp_path, ONE)


def test_a_tensor_of_an_unregistered_class_is_stored_only_where_a_target_has_its_class(tmp_path):
    tensor = quantized(Unregistered)
    check_round_trip(tensor, "a buffer", tmp_path / "a")
    for position in ("a value", "an object", "a state of an optimizer"):
        with pytest.raises(CheckpointError, match="`load` cannot build") as caught:
            check_round_trip(tensor, position, tmp_path / position)
    assert "torch.serialization.add_safe_globals([Unregistered])" in caught.value.fix
    with torch.serialization.safe_globals([Unregistered]):
        check_round_trip(tensor, "a value", tmp_path / "b")
    with pytest.raises(CheckpointError, match="unknown class"):
        faccel.load({"x": None}, tmp_path / "b", ONE)


def test_a_quantized_buffer_of_another_kind_raises_before_anything_is_read(tmp_path):
    faccel.save([nn.Linear(1, 1), Holder(quantized())], tmp_path / "a", ONE, step=1)
    faccel.save([nn.Linear(1, 1), Holder(torch.ones(2, 3))], tmp_path / "b", ONE, step=1)
    other = quantized()
    other.zero = 4
    wrong = {"a": (torch.ones(2, 3), quantized(Unregistered), other), "b": (quantized(),)}
    for name, tensors in wrong.items():
        for tensor in tensors:
            net = nn.Linear(1, 1)
            before = bits(net.weight)
            with pytest.raises(CheckpointError, match="does not fit"):
                faccel.load([net, Holder(tensor)], tmp_path / name, ONE)
            assert bits(net.weight) == before
    with pytest.raises(CheckpointError, match="cannot be exported"):
        faccel.checkpoint.export_model(Holder(quantized()), tmp_path, ONE)


ARRAYS = [np.arange(2).astype(code) for code in ("<f4", ">f4", ">i8", "u2", "f2", "c16", "?")]


@pytest.mark.parametrize("array", ARRAYS, ids=lambda array: array.dtype.str)
def test_an_array_comes_back_in_its_byte_order(tmp_path, array):
    faccel.save({"x": array}, tmp_path, ONE, step=1)
    loaded = faccel.load({"x": None}, tmp_path, ONE)["x"]
    assert (loaded.dtype, loaded.tobytes()) == (array.dtype, array.tobytes())


@pytest.mark.parametrize("array", [np.ma.masked_array([1, 2], [0, 1]), np.ones(2, np.longdouble)])
def test_an_array_that_would_lose_something_is_refused(tmp_path, array):
    with pytest.raises(CheckpointError, match="`x` is"):
        faccel.save({"x": array}, tmp_path, ONE, step=1)


def test_a_container_inside_of_itself_is_refused_by_save_and_load(tmp_path):
    items = [1]
    items.append({"y": items})
    state = {"deep": {"items": items}}
    with pytest.raises(CheckpointError, match="`deep/items/1/y` contains itself"):
        faccel.save(state, tmp_path, ONE, step=1)
    faccel.save({"deep": {}}, tmp_path, ONE, step=1)
    with pytest.raises(CheckpointError, match="contains itself"):
        faccel.load(state, tmp_path, ONE)
    inner = Stateful({})
    inner.x["x"] = inner.x
    with pytest.raises(CheckpointError, match="contains itself"):
        faccel.save(inner, tmp_path, ONE, step=2)
    twice = [1]
    faccel.save([twice, (twice, twice)], tmp_path, ONE, step=2)
    assert faccel.load([[], ()], tmp_path, ONE) == [[1], ([1], [1])]


# Layouts


class Net(nn.Module):
    """Parameters and buffers of several dtypes, of which no dim is a multiple of two ranks."""

    def __init__(self, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape, dtype=torch.float32):
            return torch.randn(shape, dtype=dtype, generator=generator)

        self.weight = nn.Parameter(draw(5, 3))
        self.bias = nn.Parameter(draw(3))
        self.single = nn.Parameter(draw(1))
        self.spectrum = nn.Parameter(draw(3, 2, dtype=torch.complex64))
        kernel = draw(3, 2, 3, 3).to(memory_format=torch.channels_last)
        self.register_buffer("kernel", kernel)
        self.register_buffer("mean", draw(3).bfloat16())
        self.register_buffer("phase", draw(3, dtype=torch.complex128))
        self.register_buffer("mask", draw(4) > 0)
        self.register_buffer("codes", draw(4).to(torch.float8_e4m3fnuz))


REAL = ("weight", "bias", "single")
MESHES = ("dp_replicate=1", "dp_replicate=2", "dp_shard=2", "dp_shard=3",
          "dp_replicate=2,dp_shard=2")  # fmt: skip
# Each layout is saved once and loaded once in the fast tests; all other pairs are slow tests.
NEXT = [(saved, MESHES[(index + 2) % len(MESHES)]) for index, saved in enumerate(MESHES)]
PAIRS = [
    pytest.param(*pair, marks=() if pair in NEXT else pytest.mark.slow)
    for pair in itertools.product(MESHES, MESHES)
]


def full(value):
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def all_bits(tree):
    """Return the bits of each tensor in nested dicts and lists, in full, and all other values."""
    if isinstance(tree, dict):
        return {key: all_bits(child) for key, child in tree.items()}
    if isinstance(tree, list | tuple):
        return [all_bits(child) for child in tree]
    return bits(full(tree)) if isinstance(tree, torch.Tensor) else tree


def net_of(ctx, seed):
    return faccel.wrap(Net(seed), ctx)


def save_net(ctx, path):
    model = net_of(ctx, 1)
    faccel.save({"model": model}, path, ctx, step=1)
    return all_bits(dict(model.state_dict()))


def load_net(ctx, path):
    model = net_of(ctx, 2)
    faccel.load({"model": model}, path, ctx)
    return all_bits(dict(model.state_dict()))


@pytest.mark.parametrize(("saved", "loaded"), PAIRS)
def test_a_model_comes_back_bit_for_bit_on_every_layout(tmp_path, saved, loaded):
    expected = all_bits(dict(Net(1).state_dict()))
    for ranks in (
        simulate(save_net, faccel.MeshSpec.of(saved).size, str(tmp_path), mesh=saved),
        simulate(load_net, faccel.MeshSpec.of(loaded).size, str(tmp_path), mesh=loaded),
    ):
        assert all(rank == expected for rank in ranks)


class Exportable(Net):
    """The part of `Net` whose dtypes files of safetensors have."""

    def __init__(self, seed):
        super().__init__(seed)
        del self.codes, self.phase


@pytest.mark.parametrize("mesh", MESHES)
def test_an_export_has_the_bits_of_the_model_and_loads_again(tmp_path, mesh):
    net = Exportable(1)
    expected = all_bits(dict(net.state_dict()))

    def run(ctx):
        faccel.checkpoint.export_model(faccel.wrap(Exportable(1), ctx), tmp_path, ctx)
        model = faccel.wrap(Exportable(2), ctx)
        faccel.checkpoint.load_model(model, tmp_path, ctx)
        return all_bits(dict(model.state_dict()))

    assert all(rank == expected for rank in simulate(run, faccel.MeshSpec.of(mesh).size, mesh=mesh))
    assert all_bits(load_file(tmp_path / "model.safetensors")) == expected


OPTIMIZERS = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True),
    "Adam": lambda params: torch.optim.Adam(params, amsgrad=True),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=torch.tensor(0.01), foreach=False),
    "Adagrad": torch.optim.Adagrad,
    "RMSprop": lambda params: torch.optim.RMSprop(params, momentum=0.9, centered=True),
    "Adadelta": torch.optim.Adadelta,
    "Adamax": torch.optim.Adamax,
    "NAdam": torch.optim.NAdam,
    "RAdam": torch.optim.RAdam,
    "ASGD": torch.optim.ASGD,
}
ON_ONE = {  # they do not support DTensors
    "Adafactor": torch.optim.Adafactor,
    "LBFGS": torch.optim.LBFGS,
    "Rprop": torch.optim.Rprop,
    "Muon": lambda params: torch.optim.Muon([next(iter(params))]),
}


def optimizer_of(ctx, name, model):
    params = [p for key, p in model.named_parameters() if key in REAL]
    return faccel.wrap_optimizer((OPTIMIZERS | ON_ONE)[name](params), model, ctx)


def step(opt, seed):
    torch.manual_seed(seed)
    for group in opt.param_groups:
        for param in group["params"]:
            grad = torch.randn(param.shape)
            param.grad = grad.to(param.dtype)
            if hasattr(param, "device_mesh"):
                from torch.distributed.tensor import distribute_tensor

                param.grad = distribute_tensor(grad, param.device_mesh, param.placements)
    opt.step(lambda: torch.tensor(1.0))


def save_optimizer(ctx, name, path):
    model = net_of(ctx, 1)
    opt = optimizer_of(ctx, name, model)
    for seed in range(3):
        step(opt, seed)
    faccel.save({"model": model, "opt": opt}, path, ctx, step=1)
    expected = all_bits(opt.state_dict())
    step(opt, 3)
    return expected, all_bits(dict(model.state_dict()))


def load_optimizer(ctx, name, path):
    model = net_of(ctx, 2)
    opt = optimizer_of(ctx, name, model)
    faccel.load({"model": model, "opt": opt}, path, ctx)
    loaded = all_bits(opt.state_dict())
    step(opt, 3)
    return loaded, all_bits(dict(model.state_dict()))


def check_optimizer(name, saved, loaded, path):
    expected = simulate(save_optimizer, faccel.MeshSpec.of(saved).size, name, path, mesh=saved)[0]
    world_size = faccel.MeshSpec.of(loaded).size
    for rank in simulate(load_optimizer, world_size, name, path, mesh=loaded):
        assert rank == expected


# Every optimizer is saved sharded or replicated in the fast tests; the other is a slow test.
DIRECTIONS = (("dp_replicate=2", "dp_shard=3"), ("dp_shard=2", "dp_replicate=1"))
WAYS = [
    pytest.param(name, *pair, marks=() if number % 2 == way else pytest.mark.slow)
    for number, name in enumerate(OPTIMIZERS)
    for way, pair in enumerate(DIRECTIONS)
]


@pytest.mark.parametrize(("name", "saved", "loaded"), WAYS)
def test_a_state_of_an_optimizer_comes_back_bit_for_bit(tmp_path, name, saved, loaded):
    check_optimizer(name, saved, loaded, str(tmp_path))


@pytest.mark.parametrize("name", ON_ONE)
def test_a_state_of_an_optimizer_without_shards_comes_back_bit_for_bit(tmp_path, name):
    check_optimizer(name, "dp_replicate=1", "dp_replicate=2", str(tmp_path))
