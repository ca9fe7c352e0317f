"""A rank that fails in a window: all ranks run it again, leave it out, or raise."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import faccel
from faccel.errors import DataError, RankFailedError
from faccel.testing import simulate
from tests.training import full

ROWS, WIDTH, SIZE = 32, 6, 4  # of a window, and its micro-batches
MESHES = ["dp_replicate=2", "dp_shard=2", "tp=2", "pp=2", "dp_replicate=2,dp_shard=2"]
pytestmark = pytest.mark.filterwarnings("ignore")  # advice of torch on layouts


class Net(nn.Module):
    """Two layers with dropout and a batch norm's buffer."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.drop = nn.Dropout(0.5)
        self.second = nn.Linear(WIDTH, 1)
        self.register_buffer("num_calls", torch.zeros(()))

    def forward(self, x):
        self.num_calls += 1
        return self.second(self.drop(self.first(x).relu()))


class Raises(torch.autograd.Function):
    """Raises in backward."""

    @staticmethod
    def forward(ctx, x, error):
        ctx.error = error
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise ctx.error


def plan_of(mesh):
    if "pp" in mesh:
        chain = faccel.parallel.PipelineConfig(chain=("first", "drop", "second"))
        return faccel.Plan(pipeline=chain)
    if "tp" in mesh:
        return faccel.Plan(tensor={"first": "colwise", "second": "rowwise"})
    return faccel.Plan(units="Linear")


def setup(ctx, mesh, *, weight=None, dataset=None):
    torch.manual_seed(0)
    model = faccel.wrap(Net().double(), ctx, plan=plan_of(mesh))
    torch.manual_seed(7)
    data = torch.linspace(0, 1, 3 * ROWS * WIDTH, dtype=torch.float64).view(-1, WIDTH)
    rows = ROWS // SIZE // ctx.data_world_size
    loader = faccel.shard(DataLoader(data if dataset is None else dataset, rows), ctx)
    return model, faccel.windows(loader, ctx, size=SIZE, weight=weight)


class Fault:
    """Raises once: on a rank, where a micro-batch has `rows` rows, before or in backward."""

    def __init__(self, error, rank, micro, where):
        self.error, self.rank, self.micro, self.where = error, rank, micro, where
        self.num_calls, self.has_failed = 0, False

    def loss_fn(self, net, batch):
        self.num_calls += 1
        x = batch.data
        fails = not self.has_failed and self.num_calls - 1 == self.micro
        if fails and self.where == "forward":
            self.has_failed = True
            raise self.error
        y = net(x)
        if fails and self.where == "backward":
            self.has_failed = True
            y = Raises.apply(y, self.error)
        return y.square().mean()


def loss_fn(net, batch):
    return net(batch.data).square().mean()


def gradients(net):
    return {name: full(p.grad) for name, p in net.named_parameters() if p.grad is not None}


def run(ctx, mesh, fault=None, max_rows=None, **options):
    model, windows = setup(ctx, mesh)
    fn = loss_fn
    if fault is not None and ctx.rank == fault[1]:
        fn = Fault(*fault).loss_fn
    scaler = faccel.init_scaler(ctx)
    if max_rows is not None:
        import attrs

        scaler = attrs.evolve(scaler, max_rows=max_rows)
    results = []
    for window in windows:
        losses, scaler = faccel.forward_backward(fn, model, window, scaler, ctx, **options)
        results.append((losses, gradients(model), scaler.max_rows))
        for p in model.parameters():
            p.grad = None
    return results


OOM = torch.OutOfMemoryError("out of memory")


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("micro", [0, 1, SIZE - 1])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_window_runs_again_with_smaller_micro_batches(mesh, where, micro, rank):
    size = faccel.MeshSpec.of(mesh).size
    rows = ROWS // SIZE // faccel.MeshSpec.of(mesh).data_world_size // 2
    if "pp" in mesh and rank == 0 and where == "backward":
        pytest.skip("the first rank of a pipeline has no loss")
    expected = simulate(run, size, mesh, None, rows, mesh=mesh)
    again = (
        simulate(
            run,
            size,
            mesh,
            (OOM, rank, micro, where),
            mesh=mesh,
        )
        if False
        else simulate(
            lambda ctx: run(ctx, mesh, (OOM, rank, micro, where), retry=faccel.Retry()),
            size,
            mesh=mesh,
        )
    )
    for mine, other in zip(again, expected, strict=True):
        assert [r[2] for r in mine] == [rows] * 3
        for (loss, grads, _), (loss2, grads2, _) in zip(mine, other, strict=True):
            assert torch.equal(loss, loss2)
            assert grads.keys() == grads2.keys() and grads
            assert all(torch.equal(grads[n], grads2[n]) for n in grads)


class Bad:
    """A dataset of which one row cannot be read once, or always."""

    def __init__(self, data, index, always):
        self.data, self.index, self.always = data, index, always

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        if index == self.index:
            if not self.always:
                self.index = -1
            raise DataError("no such file")
        return self.data[index]


def dummy(ctx):
    return None


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_window_is_left_out_on_all_ranks(mesh, where):
    def train(ctx, fault, left_out):
        model, windows = setup(ctx, mesh)
        opt = faccel.wrap_optimizer(torch.optim.Adam(model.parameters()), model, ctx)
        scaler = faccel.init_scaler(ctx)
        fn = loss_fn
        if fault is not None and ctx.rank == 1:
            fn = Fault(DataError("bad"), 1, SIZE + 1, where).loss_fn
        infos = []
        for index, window in enumerate(windows):
            if index == left_out:
                continue
            losses, scaler = faccel.forward_backward(
                fn, model, window, scaler, ctx, skip=(DataError,)
            )
            info, scaler = faccel.optimizer_step(opt, scaler, ctx)
            infos.append((len(losses), info.skipped))
        return infos, scaler.num_skipped, {n: full(p) for n, p in model.named_parameters()}

    size = faccel.MeshSpec.of(mesh).size
    for (infos, num, params), (_, _, expected) in zip(
        simulate(train, size, True, None, mesh=mesh),
        simulate(train, size, None, 1, mesh=mesh),
        strict=True,
    ):
        assert infos == [(SIZE, False), (0, True), (SIZE, False)] and num == 1
        assert all(torch.equal(params[n], expected[n]) for n in params)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("where", ["forward", "backward", "optimizer"])
def test_an_exception_is_raised_and_named_on_the_other_ranks(mesh, where):
    def train(ctx):
        model, windows = setup(ctx, mesh)
        opt = faccel.wrap_optimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, ctx)
        fn = loss_fn
        if ctx.rank == 1 and where != "optimizer":
            fn = Fault(KeyError("mine"), 1, SIZE + 1, where).loss_fn
        if ctx.rank == 1 and where == "optimizer":
            opt.register_step_pre_hook(lambda *args: {}["mine"])
        scaler = faccel.init_scaler(ctx)
        own = KeyError
        if mesh == "pp=2" and where == "backward":
            own = RuntimeError  # torch's pipeline raises it from the exception of a stage
        with pytest.raises(own if ctx.rank == 1 else RankFailedError) as caught:
            for window in windows:
                _, scaler = faccel.forward_backward(fn, model, window, scaler, ctx)
                _, scaler = faccel.optimizer_step(opt, scaler, ctx)
        assert "mine" in str(caught.value) + str(caught.value.__cause__)
        # they can communicate again
        return faccel.reduce(torch.ones(()), ctx, op="sum", axis="world").item()

    size = faccel.MeshSpec.of(mesh).size
    assert simulate(train, size, mesh=mesh) == (size,) * size


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("weight", [None, lambda batch: batch.num_valid])
@pytest.mark.parametrize("index", [0, ROWS + 3, 3 * ROWS - 1])
def test_a_failed_read_leaves_out_its_window(mesh, weight, index):
    data = torch.linspace(0, 1, 3 * ROWS * WIDTH, dtype=torch.float64).view(-1, WIDTH)

    def train(ctx, fails):
        model, windows = setup(
            ctx, mesh, weight=weight, dataset=Bad(data, index, True) if fails else data
        )
        opt = faccel.wrap_optimizer(torch.optim.SGD(model.parameters(), lr=0), model, ctx)
        scaler, result = faccel.init_scaler(ctx), []
        for number, window in enumerate(windows):
            losses = torch.zeros(0)
            if fails or number != index // ROWS:
                losses, scaler = faccel.forward_backward(
                    loss_fn, model, window, scaler, ctx, skip=(DataError,)
                )
            result.append((losses, window.cursor))
            if not fails and number == index // ROWS:
                continue
            _, scaler = faccel.optimizer_step(opt, scaler, ctx)
        return result

    size = faccel.MeshSpec.of(mesh).size
    for mine, expected in zip(
        simulate(train, size, True, mesh=mesh), simulate(train, size, False, mesh=mesh), strict=True
    ):
        assert [cursor for _, cursor in mine] == [cursor for _, cursor in expected]
        assert all(
            torch.equal(losses, others)
            for (losses, _), (others, _) in zip(mine, expected, strict=True)
        )


@pytest.mark.parametrize("mesh", ["dp_replicate=1", *MESHES])
def test_the_batch_size_that_fits_on_every_rank_is_found(mesh):
    size = faccel.MeshSpec.of(mesh).size
    limits = [20, 9, 30, 12][:size]  # rows that fit on each rank

    def find(ctx):
        sizes = []

        def fn(rows):
            sizes.append(rows)
            model, windows = setup(ctx, mesh)
            for window in windows:
                if rows > limits[ctx.rank]:
                    raise torch.OutOfMemoryError("out of memory")
                faccel.forward_backward(loss_fn, model, window, faccel.init_scaler(ctx), ctx)

        found = faccel.find_batch_size(fn, ctx, start=64)
        return found, sizes, faccel.reduce(torch.ones(()), ctx, op="sum", axis="world").item()

    largest = 16 if size == 1 else 8
    for found, sizes, total in simulate(find, size, mesh=mesh):
        assert (found, total) == (largest, size)
        assert sizes == [rows for rows in (64, 32, 16, 8) if rows >= largest]
