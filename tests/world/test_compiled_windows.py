"""`forward_backward` compiles as many graphs as the loop written by hand in plain torch."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import faccel
from faccel.testing import simulate

ROWS, WIDTH, SIZE, NUM_WINDOWS = 4, 8, 4, 3  # rows of a micro-batch; micro-batches of a window
pytestmark = pytest.mark.filterwarnings("ignore")  # Dynamo's, while it traces
MESHES = ["dp_replicate=1", "dp_replicate=2", "dp_shard=2"]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(self.linear(x).relu())


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(WIDTH, 2)
        self.register_buffer("num_calls", torch.zeros(()))

    def forward(self, x):
        self.num_calls += 1
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Backend:
    """Runs graphs as they are, and counts them."""

    def __init__(self):
        self.num_graphs = 0

    def __call__(self, graph, inputs):
        self.num_graphs += 1
        return graph


def data(num_ranks):
    return torch.linspace(-1, 1, NUM_WINDOWS * SIZE * ROWS * num_ranks * WIDTH).view(-1, WIDTH)


def compiled(net, how, backend):
    """Compile the model by one of torch's ways; a loss function is compiled elsewhere."""
    if how == "model":
        return torch.compile(net, backend=backend)
    if how == "in place":
        net.compile(backend=backend)
    if how == "units":
        for block in net.blocks:
            block.compile(backend=backend)
    return net


def loss_of(prediction, x):
    return F.mse_loss(prediction.float(), x[:, :2])


def distributed(net, model, mesh):
    """Return `model`, a module or its compiled form, on the ranks of a mesh, by plain torch."""
    if mesh == "dp_replicate=2":
        return DistributedDataParallel(model)
    if mesh == "dp_shard=2":
        for unit in (*net.blocks, model):
            fully_shard(unit)
    return model


def set_sync(model, *, on):
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = on
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(on)


def run_by_hand(ctx, mesh, how, backend, parts):
    """Train in plain torch; `parts` of a micro-batch for each window."""
    net = Net()
    model = distributed(net, compiled(net, how, backend), mesh)
    opt = torch.optim.SGD(net.parameters(), lr=0.1)

    def loss_fn(x):
        return loss_of(model(x), x)

    if how == "loss":
        loss_fn = torch.compile(loss_fn, backend=backend)
    micro_batches = iter(data(1).split(ROWS))
    for num_parts in parts:
        for index in range(SIZE):
            set_sync(model, on=index == SIZE - 1)
            for part in next(micro_batches).chunk(num_parts):
                loss_fn(part).backward()
        opt.step()
        opt.zero_grad()


def run(ctx, how, backend, fails, policy):
    """Train with `forward_backward`; return the number of graphs after each window."""
    net = Net()
    _, _, by_plan = how.partition("plan ")
    plan = faccel.Plan(units="Block", compile=by_plan or None)
    model = faccel.wrap(compiled(net, how, backend), ctx, plan=plan)
    opt = faccel.wrap_optimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, ctx)
    calls = []

    def loss_fn(model, batch):
        return loss_of(model(batch.data), batch.data)

    if how == "loss":
        loss_fn = torch.compile(loss_fn, backend=backend)

    def failing_loss_fn(model, batch):
        calls.append(1)
        if ctx.rank == 0 and len(calls) in fails:
            raise torch.OutOfMemoryError("out of memory")
        return loss_fn(model, batch)

    scaler = faccel.init_scaler(ctx)
    loader = faccel.shard(DataLoader(data(ctx.data_world_size), ROWS), ctx)
    graphs = []
    for window in faccel.windows(loader, ctx, size=SIZE):
        _, scaler = faccel.forward_backward(failing_loss_fn, model, window, scaler, ctx, **policy)
        _, scaler = faccel.optimizer_step(opt, scaler, ctx)
        graphs.append(backend.num_graphs)
    return graphs, scaler.max_rows


def num_graphs_by_hand(mesh, how, parts):
    torch._dynamo.reset()
    backend = Backend()
    simulate(run_by_hand, int(mesh[-1]), mesh, how, backend, parts, mesh=mesh)
    torch._dynamo.reset()
    return backend.num_graphs


def graphs_of(mesh, how, fails=(), precision="no", **policy):
    """Return the number of graphs after each window, on each rank."""
    backend = Backend()
    config = {"mixed_precision": precision}
    with torch.compiler.set_stance("default", force_backend=backend):
        return simulate(run, int(mesh[-1]), how, backend, fails, policy, mesh=mesh, config=config)


# What is compiled: the model; its units, called by the model; or the loss function, which calls the
# model. By `torch.compile`, by `module.compile()`, or by a plan of faccel.
COMPILED = {
    "model": "model", "in place": "model", "plan whole": "model", "units": "units",
    "plan units": "units", "loss": "loss",
}  # fmt: skip
CELLS = list(itertools.product(MESHES, COMPILED))


def table(*fast):
    """Return all cells, of which only a few run in every suite."""
    slow = [pytest.param(*cell, marks=pytest.mark.slow) for cell in CELLS if cell not in fast]
    return [*fast, *slow]


@pytest.mark.parametrize(("mesh", "how"), table((MESHES[0], "loss"), (MESHES[2], "loss")))
def test_windows_compile_no_more_graphs_than_plain_torch(mesh, how):
    expected = num_graphs_by_hand(mesh, COMPILED[how], [1])
    if mesh != "dp_shard=2" and COMPILED[how] == "model":
        assert expected == 1
    for graphs, _ in graphs_of(mesh, how, retry=faccel.Retry()):
        assert graphs == [expected] * NUM_WINDOWS


@pytest.mark.parametrize("mesh", MESHES[:2])
def test_mixed_precision_and_a_plain_call_compile_as_many(mesh):
    expected = num_graphs_by_hand(mesh, "loss", [1])
    for graphs, _ in graphs_of(mesh, "loss", precision="bf16"):
        assert graphs == [expected] * NUM_WINDOWS


@pytest.mark.parametrize(("mesh", "how"), table((MESHES[0], "model")))
def test_a_retry_compiles_no_more_graphs_than_a_loop_with_the_smaller_size(mesh, how):
    expected = num_graphs_by_hand(mesh, COMPILED[how], [1, 2, 4])
    # in the second window, and in its second attempt
    fails = (SIZE + 2, SIZE + 4)
    for graphs, max_rows in graphs_of(mesh, how, fails, retry=faccel.Retry()):
        assert max_rows == 1
        assert graphs == [*graphs[:1], expected, expected]


class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = Block(), Block(), nn.Linear(WIDTH, 2)

    def forward(self, x):
        return self.head(self.second(self.first(x)))


def run_pipeline(ctx, how, backend):
    """Return the losses and the number of graphs of each window."""
    torch.manual_seed(0)
    _, _, by_plan = how.partition("plan ")
    pipeline = faccel.parallel.PipelineConfig(chain=("first", "second", "head"))
    plan = faccel.Plan(units="Block", compile=by_plan or None, pipeline=pipeline)
    model = faccel.wrap(Chain(), ctx, plan=plan)

    def loss_fn(model, batch):
        return loss_of(model(batch.data * 1.0), batch.data)

    if how == "loss":
        loss_fn = torch.compile(loss_fn, backend=backend)
    scaler, losses, graphs = faccel.init_scaler(ctx), [], []
    for window in faccel.windows(faccel.shard(DataLoader(data(1), ROWS), ctx), ctx, size=SIZE):
        values, scaler = faccel.forward_backward(loss_fn, model, window, scaler, ctx)
        losses.append(values.tolist())
        graphs.append(backend.num_graphs)
    return losses, graphs


# The first rank runs the loss function up to the call of the model: one graph more.
@pytest.mark.parametrize(
    ("how", "num_graphs"), [("loss", 2), pytest.param("plan units", None, marks=pytest.mark.slow)]
)
def test_a_pipeline_compiles_in_its_first_window_only(how, num_graphs):
    torch._dynamo.reset()
    backend = Backend()
    with torch.compiler.set_stance("default", force_backend=backend):
        compiled_runs = simulate(run_pipeline, 2, how, backend, mesh="pp=2")
    for (losses, graphs), (eager_losses, _) in zip(
        compiled_runs, simulate(run_pipeline, 2, "eager", backend, mesh="pp=2"), strict=True
    ):
        assert losses == eager_losses
        assert graphs == [num_graphs or graphs[0]] * NUM_WINDOWS
