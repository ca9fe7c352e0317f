"""Placed models: equal outputs, errors before anything is loaded, and back to ordinary modules."""

import copy
import gc
import json
import os
import pickle
import threading

import attrs
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import faccel
from faccel.checkpoint import export_model, load_model
from faccel.errors import CheckpointError, ConfigError, FaccelError, ModelError
from faccel.inference import materialize, offload, on_meta, place, placement_for
from faccel.offloaded_tensor import OffloadedTensor
from faccel.testing import fake_context, simulate

X = torch.linspace(-1, 1, 24).reshape(3, 8)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8, bias=False)
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Tied(nn.Module):
    """Blocks between an embedding and a head with its weight, and a scale that the root uses."""

    def __init__(self, num_blocks=5):
        super().__init__()
        self.scale = nn.Parameter(torch.full((8,), 0.5))
        self.embed = nn.Embedding(12, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(num_blocks))
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("shift", torch.linspace(0, 1, 8), persistent=False)

    def forward(self, ids):
        x = self.embed(ids) * self.scale + self.shift
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        x = self.encoder(x[None])
        return self.attention(x, x, x)[0]


class Repeated(nn.Module):
    """One block that runs three times, as in ALBERT, and a submodule with two names."""

    def __init__(self):
        super().__init__()
        self.first = self.again = nn.Linear(8, 8)
        self.block, self.last = Block(), nn.Linear(8, 8)

    def forward(self, x):
        x = self.first(x)
        for _ in range(3):
            x = self.block(x)
        return self.last(self.again(x))


class Conditional(nn.Module):
    """Runs other layers in other orders, depending on the input."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))

    def forward(self, x):
        start = int(x.flatten()[0])
        for index in range(0, 6, 1 + start):
            x = self.layers[(start - index) % 6](x) + start
        return x


class Convolutions(nn.Sequential):
    """Has buffers that are stored."""

    def __init__(self):
        small = [nn.Conv1d(4, 4, 1) for _ in range(4)]
        super().__init__(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.Conv1d(4, 4, 2), *small)


IDS = torch.tensor([1, 5, 11])
MODELS = {
    "tied": (Tied, [IDS, IDS.flip(0)], 2400),
    "attention": (Attention, [X, X + 1], 5000),
    "repeated": (Repeated, [X, -X], 1200),
    "conditional": (Conditional, [X * 0, X * 0 + 2, X * 0 + 1, X * 0], 700),
    "sequential": (lambda: nn.Sequential(*(nn.Linear(8, 8) for _ in range(9))), [X, X], 600),
    "conv": (Convolutions, [X[None], X[None] + 1], 350),
}


def built(make):
    torch.manual_seed(0)
    net = make().eval()
    with torch.no_grad():
        for buffer in net.buffers():
            if buffer.is_floating_point() and buffer.ndim:
                buffer.add_(0.25)
    return net


def exported(make, folder, **options):
    """Return a model with weights, and another one on meta whose buffers have values."""
    net = built(make)
    export_model(net, folder, fake_context(0, 1), **options)
    with on_meta():
        empty = make().eval()
    return net, empty


def without_buffers(net, empty):
    """Copy the buffers that are not stored: their values are the builder's."""
    stored = net.state_dict().keys()
    for name, buffer in net.named_buffers():
        if name not in stored:
            empty.get_buffer(name).copy_(buffer)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("budget", ["smallest", "larger", "all"])
def test_outputs_equal_those_of_the_plain_model(name, budget, tmp_path):
    make, inputs, size = MODELS[name]
    net, empty = exported(make, tmp_path)
    without_buffers(net, empty)
    size = {"smallest": size, "larger": size + size // 4, "all": 10**6}[budget]
    placed = place(empty, tmp_path, fake_context(0, 1), budget={"cpu": size, "disk": "1GB"})
    assert ("disk" in placed.placement.device_map.values()) == (budget != "all")
    with torch.no_grad():
        for x in [*inputs, *inputs]:
            assert torch.equal(placed(x), net(x))
    assert not any(param.is_meta for param in placed.module.parameters())


def test_a_pass_reads_each_offloaded_unit_once(tmp_path):
    _net, empty = exported(lambda: nn.Sequential(*(nn.Linear(8, 8) for _ in range(9))), tmp_path)
    # A layer has 288 bytes, in a buffer 320: two of them are the window.
    placed = place(empty, tmp_path, fake_context(0, 1), budget={"cpu": 640, "disk": "1GB"})
    assert set(placed.placement.device_map.values()) == {"disk"}
    for _ in range(4):
        placed(X)
    # Each pass ends with the first layer of the next one in memory.
    assert placed.session.window.num_read == 4 * 9 + 1


def open_files(folder):
    """Return the files of a folder that this process has open."""
    paths = [os.path.realpath(entry.path) for entry in os.scandir("/proc/self/fd")]
    return [path for path in paths if path.startswith(str(folder))]


def test_files_are_closed_when_a_model_is_dropped(tmp_path):
    _, empty = exported(Tied, tmp_path)
    placed = place(empty, tmp_path, fake_context(0, 1), budget={"cpu": 4000, "disk": "1GB"})
    assert open_files(tmp_path)
    del empty, placed
    gc.collect()
    assert not open_files(tmp_path)


def test_the_files_of_an_index_are_read(tmp_path):
    net, empty = exported(Tied, tmp_path, max_shard_size=1000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    without_buffers(net, empty)
    placed = place(empty, tmp_path, fake_context(0, 1), budget={"cpu": 2400, "disk": "1GB"})
    with torch.no_grad():
        assert torch.equal(placed(IDS), net(IDS))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_are_cast_while_they_are_read(dtype, tmp_path):
    net, empty = exported(lambda: nn.Sequential(*(nn.Linear(8, 8) for _ in range(4))), tmp_path)
    placed = place(
        empty, tmp_path, fake_context(0, 1), budget={"cpu": 1300, "disk": "1GB"}, dtype=dtype
    )
    with torch.no_grad():
        assert torch.equal(placed(X.to(dtype)), net.to(dtype)(X.to(dtype)))


def test_a_custom_placement_is_followed(tmp_path):
    net, empty = exported(Tied, tmp_path)
    without_buffers(net, empty)
    placement = placement_for(empty, {"cpu": 10**6, "disk": "1GB"}).with_device("blocks.1", "disk")
    ctx = fake_context(0, 1)
    placed = place(empty, tmp_path, ctx, placement=placement)
    offloaded = [
        name for name, param in empty.named_parameters() if isinstance(param, OffloadedTensor)
    ]
    assert {name.rpartition(".")[0].rpartition(".")[0] for name in offloaded} == {"blocks.1"}
    with torch.no_grad():
        assert torch.equal(placed(IDS), net(IDS))
    with pytest.raises(ConfigError, match="not one of this model"):
        place(Conditional(), tmp_path, ctx, placement=placement)


def test_a_placement_excludes_a_budget_and_fits_its_dtype(tmp_path):
    _, empty = exported(Tied, tmp_path)
    budget, ctx = {"cpu": 4000, "disk": "1GB"}, fake_context(0, 1)
    placement = placement_for(empty, budget, dtype=torch.bfloat16)
    for options in ({"budget": budget}, {"strategy": "sequential"}):
        with pytest.raises(ConfigError, match="instead of `budget` and `strategy`"):
            place(empty, tmp_path, ctx, placement=placement, **options)
    for value in ("cpu", placement.device_map):
        with pytest.raises(ConfigError, match="`placement` must be a Placement"):
            place(empty, tmp_path, ctx, placement=value)
    with pytest.raises(ConfigError, match="`plan` must be a Plan"):
        place(empty, tmp_path, ctx, budget=budget, plan={"units": "blocks.*"})
    # In fp32 the units would exceed the budget of the placement.
    with pytest.raises(ConfigError, match="a dtype with fewer bytes"):
        place(empty, tmp_path, ctx, placement=placement)
    in_other_order = attrs.evolve(placement, units=placement.units[::-1])
    place(empty, tmp_path, ctx, placement=in_other_order, dtype=torch.bfloat16)


def changed_file(folder, change):
    path = folder / "model.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path)


WRONG_FILES = {
    "missing": (lambda state: state.pop("blocks.1.up.weight"), r"`?blocks.1.up.weight`?.*missing"),
    "unknown": (lambda state: state.update(extra=torch.ones(1)), "extra.*unknown"),
    "misshapen": (
        lambda state: state.update({"blocks.1.up.weight": torch.ones(3)}),
        r"blocks.1.up.weight \[3\] for \[16, 8\].*another shape",
    ),
    "mistyped": (
        lambda state: state.update({"scale": torch.ones(8, dtype=torch.complex64)}),
        "scale.*cannot be cast",
    ),
}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_files_that_do_not_fit_are_named_before_the_model_is_changed(name, tmp_path):
    _net, empty = exported(Tied, tmp_path)
    change, message = WRONG_FILES[name]
    changed_file(tmp_path, change)
    with pytest.raises(CheckpointError, match=message):
        place(empty, tmp_path, fake_context(0, 1), budget={"cpu": 2400, "disk": "1GB"})
    assert all(param.is_meta for param in empty.parameters())
    assert not empty.blocks[1]._forward_pre_hooks


def test_a_buffer_without_values_is_named(tmp_path):
    exported(Tied, tmp_path)
    with torch.device("meta"):
        empty = Tied()
    with pytest.raises(FaccelError, match=r"`?shift`?"):
        place(empty, tmp_path, fake_context(0, 1), budget={"cpu": 2400, "disk": "1GB"})


class Outside(nn.Module):
    """Uses the weight of a layer outside of the layer's forward."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        for layer in self.layers[:3]:
            x = layer(x)
        return x @ self.layers[3].weight


def test_a_weight_that_is_used_outside_of_its_module_is_named(tmp_path):
    net, empty = exported(Outside, tmp_path)
    placed = place(empty, tmp_path, fake_context(0, 1), budget={"cpu": 640, "disk": "1GB"})
    with pytest.raises(ModelError, match=r"`layers.3.weight` is used outside.*`layers.3`"):
        placed(X)
    assert torch.equal(materialize(placed)(X), net(X))


def test_a_sample_finds_a_weight_that_is_used_outside_before_anything_is_loaded(tmp_path):
    net, empty = exported(Outside, tmp_path)
    ctx, budget = fake_context(0, 1), {"cpu": 640, "disk": "1GB"}
    with pytest.raises(ModelError, match=r"`layers.3.weight` of the unit `layers.3`"):
        place(empty, tmp_path, ctx, budget=budget, sample=X)
    assert all(param.is_meta for param in empty.parameters())
    assert not empty.layers[3]._forward_pre_hooks and not empty.layers[3]._forward_hooks
    with pytest.raises(ModelError, match=r"`layers.3.weight` of the unit `layers.3`"):
        offload(net, "disk", ctx, folder=tmp_path / "new", sample={"x": X})
    assert not (tmp_path / "new").exists()
    placement = placement_for(empty, {"cpu": 1280, "disk": "1GB"}).with_device("layers.3", "cpu")
    placed = place(empty, tmp_path, ctx, placement=placement, sample=(X,))
    assert torch.equal(placed(X), net(X))


class InnerOutside(nn.Module):
    """Runs a layer of a block after the block's forward, and uses two tied weights."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
        self.last.weight = self.first.weight

    def forward(self, x):
        x = self.blocks[1](self.blocks[0](self.first(x)))
        return self.last(self.blocks[0].norm(x))


def test_a_sample_finds_an_inner_layer_but_no_tied_weight(tmp_path):
    _, empty = exported(InnerOutside, tmp_path)
    with pytest.raises(ModelError, match=r"`blocks.0.norm.weight`.*`blocks.0.norm.bias`") as error:
        place(empty, tmp_path, fake_context(0, 1), budget={"cpu": 2400, "disk": "1GB"}, sample=X)
    assert "first" not in str(error.value) and "last" not in str(error.value)


@pytest.mark.parametrize("name", MODELS)
def test_a_sample_changes_nothing_of_a_model_that_can_be_placed(name, tmp_path):
    make, inputs, size = MODELS[name]
    net, empty = exported(make, tmp_path)
    without_buffers(net, empty)
    options = {"budget": {"cpu": size, "disk": "1GB"}, "sample": inputs[0]}
    if name == "conditional":
        with pytest.raises(ModelError, match=r"`sample` without values"):
            place(empty, tmp_path, fake_context(0, 1), **options)
        return
    placed = place(empty, tmp_path, fake_context(0, 1), **options)
    with torch.no_grad():
        assert torch.equal(placed(inputs[1]), net(inputs[1]))


def test_the_fix_for_a_weight_outside_of_its_module_works(tmp_path):
    net, empty = exported(Outside, tmp_path)
    placement = placement_for(empty, {"cpu": 1280, "disk": "1GB"}).with_device("layers.3", "cpu")
    placed = place(empty, tmp_path, fake_context(0, 1), placement=placement)
    assert torch.equal(placed(X), net(X))


def test_inputs_that_require_a_gradient_are_an_error(tmp_path):
    _, empty = exported(Conditional, tmp_path)
    placed = place(empty, tmp_path, fake_context(0, 1), budget={"cpu": 640, "disk": "1GB"})
    x = (X * 0).requires_grad_()
    with pytest.raises(ModelError, match="materialize"):
        placed.module(x)
    assert placed(x).requires_grad is False


def test_a_model_can_be_called_after_an_error_in_its_forward(tmp_path):
    net, empty = exported(Conditional, tmp_path)
    placed = place(empty, tmp_path, fake_context(0, 1), budget={"cpu": 640, "disk": "1GB"})
    with pytest.raises(RuntimeError, match="shapes"):
        placed(torch.zeros(3, 7))
    assert all(isinstance(param, OffloadedTensor) for param in placed.module.parameters())
    assert torch.equal(placed(X * 0), net(X * 0))


def test_an_interrupted_forward_leaves_room_for_the_next_one(tmp_path):
    """Ctrl-C is no `Exception`: PyTorch calls no hook after it."""
    net, empty = exported(Conditional, tmp_path)
    placed = place(empty, tmp_path, fake_context(0, 1), budget={"cpu": 640, "disk": "1GB"})
    interrupted = []

    def interrupt(module, args):  # its weight is in memory
        interrupted.append(module)
        raise KeyboardInterrupt

    for layer in placed.module.layers:
        handle = layer.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            placed(X * 0)
        handle.remove()
    assert len(interrupted) == 6
    assert torch.equal(placed(X * 0), net(X * 0))
    # Afterwards all units are offloaded again.
    assert all(isinstance(param, OffloadedTensor) for param in placed.module.parameters())


def test_a_call_in_a_second_thread_is_an_error_and_the_first_one_continues(tmp_path):
    net, empty = exported(Conditional, tmp_path)
    placed = place(empty, tmp_path, fake_context(0, 1), budget={"cpu": 640, "disk": "1GB"})
    errors = []

    def call():
        try:
            placed(X * 0)
        except ModelError as error:
            errors.append(str(error))

    def in_thread(module, args, output):
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()

    handle = placed.module.layers[3].register_forward_hook(in_thread)
    assert torch.equal(placed(X * 0), net(X * 0))
    handle.remove()
    assert len(errors) == 1 and "one thread at a time" in errors[0]
    assert torch.equal(placed(X * 0), net(X * 0))
    call()
    in_thread(None, None, None)  # one after the other
    assert len(errors) == 1


class Branch(nn.Linear):
    """Calls the model that contains it, as a tree does, and then uses its weight."""

    def forward(self, x, model, depth):
        if depth:
            x = model(x, depth - 1)
        return super().forward(x)


class Recursive(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Branch(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, x, depth=2):
        x = self.layers[0](x, self, depth)
        return self.layers[2](self.layers[1](x))


def test_a_model_that_calls_itself_is_not_an_interrupted_one(tmp_path):
    net, empty = exported(Recursive, tmp_path)
    budget = {"cpu": 640, "disk": "1GB"}  # room for two of three layers
    placed = place(empty, tmp_path, fake_context(0, 1), budget=budget)
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(placed(X), net(X))


def test_a_compiled_placed_model_computes_the_same_without_warnings(tmp_path):
    net, empty = exported(Conditional, tmp_path)
    placed = place(empty, tmp_path, fake_context(0, 1), budget={"cpu": 640, "disk": "1GB"})
    compiled = torch.compile(placed.module, backend="eager")
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(compiled(X * 0), net(X * 0))


def test_a_copy_of_a_placed_model_is_an_error_that_names_what_to_do(tmp_path):
    _, empty = exported(Conditional, tmp_path)
    placed = place(empty, tmp_path, fake_context(0, 1), budget={"cpu": 640, "disk": "1GB"})
    for call in (copy.deepcopy, pickle.dumps, lambda value: torch.save(value, tmp_path / "x")):
        for value in (placed, placed.module):
            with pytest.raises(ModelError, match=r"cannot be copied or pickled(.|\n)*state_dict"):
                call(value)
    for call in (nn.Module.half, lambda module: module.to("meta")):
        with pytest.raises(ModelError, match=r"cannot be moved or cast(.|\n)*again(.|\n)*dtype="):
            call(placed.module)


def test_a_replaced_parameter_of_an_offloaded_unit_is_not_overwritten_silently(tmp_path):
    net, empty = exported(Conditional, tmp_path)
    placed = place(empty, tmp_path, fake_context(0, 1), budget={"cpu": 640, "disk": "1GB"})
    state = {name: tensor * 0 for name, tensor in net.state_dict().items()}
    placed.module.load_state_dict(state, assign=True)
    with pytest.raises(ModelError, match=r"`weight` of the offloaded unit `layers.0` was replaced"):
        placed(X * 0)


def test_a_forked_process_raises_instead_of_waiting_for_ever(tmp_path):
    _, empty = exported(Conditional, tmp_path)
    placed = place(empty, tmp_path, fake_context(0, 1), budget={"cpu": 640, "disk": "1GB"})
    child = os.fork()
    if not child:
        try:
            placed(X * 0)
        except ModelError as error:
            os._exit(0 if "forked process" in str(error) else 2)
        os._exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.complex64, "bf16", 3])
def test_a_dtype_in_which_models_do_not_compute_is_an_error(dtype, tmp_path):
    _, empty = exported(Conditional, tmp_path)
    budget = {"cpu": 640, "disk": "1GB"}
    with pytest.raises(ConfigError, match="`dtype`"):
        place(empty, tmp_path, fake_context(0, 1), budget=budget, dtype=dtype)
    placement = placement_for(empty, budget)
    with pytest.raises(ConfigError, match="`dtype`"):
        place(empty, tmp_path, fake_context(0, 1), placement=placement, dtype=dtype)


def test_a_device_that_this_process_lacks_is_named_before_anything_is_read(tmp_path):
    net, empty = exported(Conditional, tmp_path)
    ctx = fake_context(0, 1)
    with pytest.raises(ConfigError, match="the device `xpu:7` of `budget` is unavailable"):
        place(empty, tmp_path, ctx, budget={"xpu:7": "1GB"})
    with pytest.raises(ConfigError, match="`budget` must be a mapping"):
        place(empty, tmp_path, ctx, budget={})
    placed = place(empty, tmp_path, ctx, budget={"cpu": 640, "disk": "1GB"})
    for device in ("xpu:7", "gpu", "disk", 3):
        with pytest.raises(ConfigError, match="`device`"):
            materialize(placed, device=device)
    assert torch.equal(placed(X * 0), net(X * 0))


def test_weights_of_an_earlier_offload_are_not_overwritten(tmp_path):
    first, second = built(Tied), built(Tied)
    placed = offload(first, "disk", fake_context(0, 1), folder=tmp_path)
    with pytest.raises(CheckpointError, match="weights of an earlier call"):
        offload(second, "disk", fake_context(0, 1), folder=tmp_path)
    assert torch.equal(placed(IDS), second(IDS))


def test_a_file_that_ends_early_is_an_error_and_weights_stay_placed(tmp_path):
    net, empty = exported(Conditional, tmp_path)
    placed = place(empty, tmp_path, fake_context(0, 1), budget={"cpu": 640, "disk": "1GB"})
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    with open(path, "r+b") as file:  # the same file, which the model has open
        file.truncate(900)
        with pytest.raises(CheckpointError, match="ends early"):
            placed(X * 0)
        with pytest.raises(CheckpointError, match="ends early"):
            materialize(placed)
        file.write(content)
    assert torch.equal(placed(X * 0), net(X * 0))
    assert torch.equal(materialize(placed)(X * 0), net(X * 0))


def test_the_state_dict_and_an_export_have_the_values(tmp_path):
    net, empty = exported(Tied, tmp_path)
    without_buffers(net, empty)
    ctx = fake_context(0, 1)
    placed = place(empty, tmp_path, ctx, budget={"cpu": 2400, "disk": "1GB"})
    state = placed.module.state_dict()
    assert state.keys() == net.state_dict().keys()
    for name, tensor in net.state_dict().items():
        assert type(state[name]) is torch.Tensor and torch.equal(state[name], tensor), name
    export_model(placed.module, tmp_path / "again", ctx)
    first = load_file(tmp_path / "model.safetensors")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_sizes_and_dtypes_are_known_while_offloaded(tmp_path):
    net, empty = exported(Tied, tmp_path)
    placed = place(empty, tmp_path, fake_context(0, 1), budget={"cpu": 2400, "disk": "1GB"})
    assert sum(p.numel() for p in empty.parameters()) == sum(p.numel() for p in net.parameters())
    weight = placed.module.blocks[4].up.weight
    assert (weight.shape, weight.dtype, weight.device.type) == ((16, 8), torch.float32, "cpu")
    with pytest.raises(ModelError, match="placed already"):
        place(empty, tmp_path, fake_context(0, 1), budget={"cpu": 2400, "disk": "1GB"})


def trained(net):
    opt = torch.optim.AdamW(net.parameters(), lr=0.1)
    for _ in range(3):
        opt.zero_grad()
        net(IDS).square().sum().backward()
        opt.step()
    return net.state_dict()


def test_training_after_materialize_equals_training_of_the_plain_model(tmp_path):
    net, empty = exported(Tied, tmp_path)
    without_buffers(net, empty)
    net.embed.requires_grad_(False)
    empty.embed.requires_grad_(False)
    placed = place(empty, tmp_path, fake_context(0, 1), budget={"cpu": 2400, "disk": "1GB"})
    placed(IDS)
    module = materialize(placed)
    assert module is empty and module.head.weight is module.embed.weight
    assert not module._forward_hooks and not module.blocks[0]._forward_pre_hooks
    for (name, a), (_, b) in zip(module.named_parameters(), net.named_parameters(), strict=True):
        assert a.requires_grad == b.requires_grad, name
    expected = trained(net)
    for name, tensor in trained(module).items():
        assert torch.equal(tensor, expected[name]), name
    with pytest.raises(ModelError, match="was materialized"):
        placed(IDS)
    with pytest.raises(ModelError, match="was materialized"):
        materialize(placed)


def test_a_model_is_offloaded_to_a_file_and_its_optimizer_continues(tmp_path):
    net = built(Tied)
    plain = built(Tied)
    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    params = list(net.parameters())
    placed = offload(net, "disk", fake_context(0, 1), folder=tmp_path)
    # All but the scale, which the root uses itself.
    assert sum(param.numel() for param in params) == 8
    assert torch.equal(placed(IDS), plain(IDS))
    assert materialize(placed) is net
    assert all(a is b for a, b in zip(net.parameters(), params, strict=True))
    net(IDS).sum().backward()
    opt.step()
    plain(IDS).sum().backward()
    torch.optim.SGD(plain.parameters(), lr=0.1).step()
    assert torch.equal(net(IDS), plain(IDS))


def test_a_folder_without_space_is_an_error_before_anything_is_written(tmp_path):
    net = nn.Sequential(nn.Linear(2, 2))
    # 256 TB of one element.
    net[0].weight = nn.Parameter(torch.ones(1).expand(2**46))
    with pytest.raises(CheckpointError, match="no space for the weights"):
        offload(net, "disk", fake_context(0, 1), folder=tmp_path / "new")
    assert not list(tmp_path.rglob("*.safetensors"))
    assert net[0].weight.numel() == 2**46


def test_mistakes_of_offload_are_named(tmp_path):
    ctx, net = fake_context(0, 1), nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="needs a `folder`"):
        offload(net, "disk", ctx)
    with pytest.raises(ConfigError, match="context on an accelerator"):
        offload(net, "cpu", ctx)
    with pytest.raises(ConfigError, match="`to` must be one of"):
        offload(net, "nvme", ctx, folder=tmp_path)
    with pytest.raises(ModelError, match="in memory"):
        offload(nn.Linear(2, 2, device="meta"), "disk", ctx, folder=tmp_path)
    with pytest.raises(ConfigError, match="`ctx` must be a DistContext"):
        place(net, tmp_path, {"cpu": "1GB"})
    with pytest.raises(ConfigError, match="swapped"):
        place(str(tmp_path), net, ctx)


def test_each_rank_has_a_model_and_an_error_of_one_is_everyones(tmp_path):
    net, _ = exported(Conditional, tmp_path)

    def fn(ctx, budget):
        with on_meta():
            empty = Conditional().eval()
        placed = place(empty, tmp_path, ctx, budget=budget)
        return placed(X * 0 + ctx.rank)

    outputs = simulate(fn, 2, {"cpu": 640, "disk": "1GB"})
    for rank, output in enumerate(outputs):
        assert torch.equal(output, net(X * 0 + rank))


def test_on_meta_leaves_buffers_ties_and_other_threads_alone():
    other = []
    with on_meta():
        net = Tied()
        thread = threading.Thread(target=lambda: other.append(nn.Linear(2, 2)))
        thread.start()
        thread.join()
    assert all(param.is_meta for param in net.parameters())
    assert net.head.weight is net.embed.weight
    assert not other[0].weight.is_meta
    assert torch.equal(net.shift, torch.linspace(0, 1, 8))
    assert not nn.Linear(2, 2).weight.is_meta
    with pytest.raises(ZeroDivisionError), on_meta():
        1 / 0  # noqa: B018
    assert not nn.Linear(2, 2).weight.is_meta


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["dp_replicate=2", "dp_shard=2", "tp=2"])
def test_a_model_on_meta_is_filled_on_any_mesh(mesh, tmp_path):
    net, _ = exported(Conditional, tmp_path)

    def fn(ctx):
        with on_meta():
            empty = Conditional()
        plan = faccel.Plan(tensor={"layers.*": "colwise_gather"} if ctx.mesh.spec.tp > 1 else {})
        model = faccel.wrap(empty, ctx, plan=plan)
        load_model(model, tmp_path, ctx)
        model.eval()
        with torch.no_grad():
            return model(X * 0 + 1)

    for output in simulate(fn, 2, mesh=mesh):
        assert torch.allclose(output, net(X * 0 + 1), atol=1e-6)


def header_of(fields):
    text = json.dumps(fields).encode()
    return len(text).to_bytes(8, "little") + text + bytes(64)


WEIGHT = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
CORRUPT = {
    "empty": b"",
    "no header": bytes(4),
    "a length beyond the file": (10**6).to_bytes(8, "little") + b"{}",
    "no JSON": (4).to_bytes(8, "little") + b"\xff\xfe{}",
    "no object": header_of([1]),
    "an unknown dtype": header_of({"weight": WEIGHT | {"dtype": "F5"}}),
    "no offsets": header_of({"weight": {"dtype": "F32", "shape": [2, 2]}}),
    "offsets outside": header_of({"weight": WEIGHT | {"data_offsets": [64, 80]}}),
    "negative offsets": header_of({"weight": WEIGHT | {"data_offsets": [-16, 0]}}),
    "a size that differs": header_of({"weight": WEIGHT | {"shape": [2, 3]}}),
    "a negative shape": header_of({"weight": WEIGHT | {"shape": [-2, -2]}}),
    "a fraction": header_of({"weight": WEIGHT | {"shape": [2.0, 2]}}),
}


@pytest.mark.parametrize("name", CORRUPT)
def test_a_corrupt_file_is_named(name, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(CORRUPT[name])
    net = nn.Linear(2, 2, bias=False, device="meta")
    with pytest.raises(CheckpointError, match=r"incomplete or corrupt.*`model.safetensors`"):
        place(net, tmp_path, fake_context(0, 1), budget={"cpu": "1GB"})
    assert net.weight.is_meta


def test_a_pipe_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="not a regular file"):
        place(nn.Linear(2, 2), tmp_path, fake_context(0, 1), budget={"cpu": "1GB"})


def test_slices_of_a_checkpoint_are_an_error_that_names_the_command(tmp_path):
    ctx = fake_context(0, 1)
    faccel.save({"net": nn.Linear(2, 2)}, tmp_path, ctx, step=1)
    (file,) = tmp_path.rglob("*.safetensors")
    with pytest.raises(CheckpointError, match="faccel merge"):
        place(nn.Linear(2, 2), file, ctx, budget={"cpu": "1GB"})


def test_a_budget_of_exactly_one_unit_is_enough(tmp_path):
    # 48 bytes; buffers align each of the two parameters to 64.
    net, empty = exported(lambda: nn.Sequential(*(nn.Linear(3, 3) for _ in range(5))), tmp_path)
    placed = place(empty, tmp_path, fake_context(0, 1), budget={"cpu": 48, "disk": "1GB"})
    with torch.no_grad():
        assert torch.equal(placed(torch.ones(2, 3)), net(torch.ones(2, 3)))
