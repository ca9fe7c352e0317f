"""`Plan(compile=...)` compiles the classes of `torch.nn`, and raises if it compiles nothing."""

import copy

import pytest
import torch
from torch import nn

import faccel
from faccel.errors import ConfigError, ModelError
from faccel.testing import fake_context, simulate

# PyTorch's warnings: at the first import of Inductor, while Dynamo traces, and of FSDP2.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*grad attribute of a Tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*returned a view tensor:UserWarning"),
]

X = torch.linspace(-1, 1, 48).reshape(2, 3, 8)


class Layers(nn.Module):
    """Two units of the user's classes."""

    def __init__(self, make_layer):
        super().__init__()
        self.layers = nn.ModuleList([make_layer(), make_layer()])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return torch.tanh(self.linear(x))


class EagerBlock(Block):
    @torch.compiler.disable
    def forward(self, x):
        return torch.tanh(self.linear(x))


class EagerLayers(Layers):
    @torch.compiler.disable
    def forward(self, x):
        return super().forward(x)


def encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def sequential():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8))


def blocks():
    torch.manual_seed(0)
    return Layers(Block)


def num_graphs():
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def loss_and_graphs(ctx, make, compile):
    """Return the loss after a step, and how many graphs each of two steps compiled."""
    model = faccel.wrap(make(), ctx, plan=faccel.Plan(compile=compile))
    opt = faccel.wrap_optimizer(torch.optim.SGD(model.parameters(), 0.1), model, ctx)
    scaler = faccel.init_scaler(ctx)
    graphs = []
    for _ in range(2):
        before = num_graphs()
        loss = model(X.clone()).square().mean()
        scaler = faccel.scaled_backward(loss, scaler, ctx)
        faccel.optimizer_step(opt, scaler, ctx)
        graphs.append(num_graphs() - before)
    return loss.item(), graphs


def eager_loss(make):
    net = make()
    opt = torch.optim.SGD(net.parameters(), 0.1)
    for _ in range(2):
        loss = net(X.clone()).square().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
    return loss.item()


@pytest.mark.slow
def test_a_second_model_may_have_the_graphs_of_the_first():
    for _ in range(2):
        loss, _ = loss_and_graphs(fake_context(0, 1), blocks, "units")
        assert abs(loss - eager_loss(blocks)) < 1e-5


def test_the_check_waits_while_the_compiler_is_turned_off():
    model = faccel.wrap(Layers(EagerBlock), fake_context(0, 1), plan=faccel.Plan(compile="units"))
    with torch.compiler.set_stance("force_eager"):
        model(X)
    with pytest.raises(ModelError, match="has compiled nothing"):
        model(X)
    model(X)  # the check runs once


@pytest.mark.parametrize("mesh", ["dp_replicate=1", "dp_replicate=2", "dp_shard=2", "pp=2"])
def test_compile_units_without_units_raises(mesh):
    plan = faccel.Plan(compile="units", pipeline=faccel.parallel.PipelineConfig(chain=("0", "1")))

    def fn(ctx):
        with pytest.raises(ConfigError, match='`compile="units"` needs units'):
            faccel.wrap(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), ctx, plan=plan)

    simulate(fn, int(mesh[-1]), mesh=mesh)


def test_a_copy_of_a_compiled_module_computes_with_its_own_parameters():
    model = faccel.wrap(sequential(), fake_context(0, 1), plan=faccel.Plan(compile="whole"))
    duplicate = copy.deepcopy(faccel.unwrap(model))
    with torch.no_grad():
        for param in duplicate.parameters():
            param.zero_()
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(duplicate(X), torch.zeros_like(X))
        assert model(X).abs().max() > 0


class Sines(nn.Module):
    """A class for these tests alone: Dynamo remembers which shapes of a function have changed."""

    def forward(self, x):
        return torch.sin(self.weight * x)

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))


def num_compilations(shapes, **options):
    """Of plain torch, for inputs of these shapes."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    net = Sines()
    net.compile(backend=backend, **options)
    for shape in shapes:
        net(torch.zeros(shape))
    return len(graphs)


@pytest.mark.parametrize("shapes", [[2, 2], [2, 3], [2, 3, 4], [(2, 2), (2, 2, 2), (1,)]], ids=str)
@pytest.mark.parametrize("dynamic", [None, False, True])
def test_recompilations_are_counted_and_logged(shapes, dynamic, caplog):
    expected = num_compilations(shapes, dynamic=dynamic) - 1
    torch._dynamo.reset()
    compile_ = faccel.parallel.Compile(backend="eager", dynamic=dynamic)
    net = faccel.wrap(Sines(), fake_context(0, 1), plan=faccel.Plan(compile=compile_))
    before = faccel.parallel.num_recompilations()
    with caplog.at_level("WARNING", logger="faccel"):
        for shape in shapes:
            net(torch.zeros(shape))
    assert faccel.parallel.num_recompilations() - before == expected
    if before == 0 and expected:
        assert "compiled a function again, 1 times" in caplog.text


class Breaks(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Block()])

    def forward(self, x):
        x = self.layers[0](x)
        torch._dynamo.graph_break()
        return x


def test_the_arguments_reach_the_compiler(monkeypatch):
    calls = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **kwargs: calls.append(kwargs))
    compile_ = faccel.parallel.Compile("units", mode="max-autotune", dynamic=True)
    faccel.wrap(Breaks(), fake_context(0, 1), plan=faccel.Plan(compile=compile_))
    expected = {"mode": "max-autotune", "dynamic": True, "fullgraph": False}
    assert calls == [{**expected, "backend": "inductor", "options": None}]


def test_fullgraph_raises_for_a_part_that_is_not_in_the_graph():
    compile_ = faccel.parallel.Compile(backend="eager", fullgraph=True)
    net = faccel.wrap(Breaks(), fake_context(0, 1), plan=faccel.Plan(compile=compile_))
    with pytest.raises(torch._dynamo.exc.Unsupported):
        net(X)


def test_units_of_one_class_are_compiled_once():
    x = X.clone().requires_grad_()  # as the output of a unit: the graph depends on it
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compile_ = faccel.parallel.Compile("units", backend="eager")
    net = faccel.wrap(Layers(Block), fake_context(0, 1), plan=faccel.Plan(compile=compile_))
    before = faccel.parallel.num_recompilations()
    net(x)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert faccel.parallel.num_recompilations() == before
