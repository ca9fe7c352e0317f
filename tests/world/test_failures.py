"""A rank that fails in a window: all ranks run it again, leave it out, or raise."""

import itertools
import os
import traceback

import attrs
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import faccel
from faccel.errors import ConfigError, DataError, RankFailedError
from faccel.testing import simulate
from tests.training import RaisesInBackward, full

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
    """Raises `error` once, on `rank`, at the call number `micro` of `loss_fn`.

    `where` is "forward" or "backward".
    """

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
            y = RaisesInBackward.apply(y, self.error)
        return y.square().mean()


def loss_fn(net, batch):
    return net(batch.data).square().mean()


def gradients(net):
    return {name: full(p.grad) for name, p in net.named_parameters() if p.grad is not None}


def run(ctx, mesh, fault=None, max_rows=None):
    """Run two windows; the rank of the fault fails in the first one."""
    model, windows = setup(ctx, mesh)
    fn = loss_fn
    if fault is not None and ctx.rank == fault[1]:
        fn = Fault(*fault).loss_fn
    scaler = attrs.evolve(faccel.init_scaler(ctx), max_rows=max_rows)
    results = []
    for window in itertools.islice(windows, 2):
        losses, scaler = faccel.forward_backward(
            fn, model, window, scaler, ctx, retry=faccel.Retry()
        )
        results.append((losses, gradients(model), scaler.max_rows))
        for param in model.parameters():
            param.grad = None
    return results


OOM = torch.OutOfMemoryError("out of memory")
POINTS = [("forward", 0, 0), ("forward", 1, 1), ("backward", 0, 1), ("backward", SIZE - 1, 1)]


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize(("where", "micro", "rank"), POINTS)
def test_a_window_runs_again_with_smaller_micro_batches(mesh, where, micro, rank):
    spec = faccel.MeshSpec.of(mesh)
    rows = ROWS // SIZE // spec.data_world_size // 2
    again = simulate(run, spec.size, mesh, (OOM, rank, micro, where), mesh=mesh)
    expected = simulate(run, spec.size, mesh, None, rows, mesh=mesh)
    for windows, expected_windows in zip(again, expected, strict=True):
        assert [max_rows for _, _, max_rows in windows] == [rows] * 2
        for window, expected_window in zip(windows, expected_windows, strict=True):
            (losses, grads, _), (expected_losses, expected_grads, _) = window, expected_window
            assert torch.equal(losses, expected_losses)
            assert grads and grads.keys() == expected_grads.keys()
            for name, grad in grads.items():
                assert torch.equal(grad, expected_grads[name]), name


class Bad:
    """A dataset of which one row cannot be read."""

    def __init__(self, data, index):
        self.data, self.index = data, index

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        if index == self.index:
            raise DataError("no such file")
        return self.data[index]


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
            fn = Fault(KeyError("label"), 1, SIZE + 1, where).loss_fn
        if ctx.rank == 1 and where == "optimizer":
            opt.register_step_pre_hook(lambda *args: {}["label"])
        scaler = faccel.init_scaler(ctx)
        expected = RankFailedError
        if ctx.rank == 1:
            expected = KeyError
            if mesh == "pp=2" and where == "backward":
                expected = RuntimeError  # torch's pipeline raises it from that of a stage
        with pytest.raises(expected) as caught:
            for window in windows:
                _, scaler = faccel.forward_backward(fn, model, window, scaler, ctx)
                _, scaler = faccel.optimizer_step(opt, scaler, ctx)
        assert "label" in str(caught.value) + str(caught.value.__cause__)
        # they can communicate again
        return faccel.reduce(torch.ones(()), ctx, op="sum", axis="world").item()

    size = faccel.MeshSpec.of(mesh).size
    assert simulate(train, size, mesh=mesh) == (size,) * size


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize(
    ("index", "weight"),
    [(0, None), (ROWS + 3, lambda batch: batch.num_valid), (3 * ROWS - 1, None)],
)
def test_a_failed_read_leaves_out_its_window(mesh, weight, index):
    data = torch.linspace(0, 1, 3 * ROWS * WIDTH, dtype=torch.float64).view(-1, WIDTH)
    left_out = index // ROWS

    def train(ctx, dataset):
        """Run all windows of a dataset; of the good one, all but the one that is left out."""
        model, windows = setup(ctx, mesh, weight=weight, dataset=dataset)
        opt = faccel.wrap_optimizer(torch.optim.SGD(model.parameters(), lr=0), model, ctx)
        scaler, result = faccel.init_scaler(ctx), []
        for number, window in enumerate(windows):
            if dataset is data and number == left_out:
                result.append((torch.zeros(0), window.cursor))
                continue
            losses, scaler = faccel.forward_backward(
                loss_fn, model, window, scaler, ctx, skip=(DataError,)
            )
            _, scaler = faccel.optimizer_step(opt, scaler, ctx)
            result.append((losses, window.cursor))
        return result

    size = faccel.MeshSpec.of(mesh).size
    results = simulate(train, size, Bad(data, index), mesh=mesh)
    for windows, expected_windows in zip(
        results, simulate(train, size, data, mesh=mesh), strict=True
    ):
        assert len(windows) == 3
        for window, expected_window in zip(windows, expected_windows, strict=True):
            (losses, cursor), (expected_losses, expected_cursor) = window, expected_window
            assert torch.equal(losses, expected_losses)
            assert cursor == expected_cursor


# Each attempt ends with a garbage collection of the process on every rank, which takes seconds.
@pytest.mark.parametrize(
    "mesh",
    [
        *("dp_replicate=1", "dp_shard=2"),
        *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in MESHES if mesh != "dp_shard=2"),
    ],
)
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

        batch_size = faccel.find_batch_size(fn, ctx, start=64)
        return batch_size, sizes, faccel.reduce(torch.ones(()), ctx, op="sum", axis="world").item()

    largest = 16 if size == 1 else 8
    for batch_size, sizes, total in simulate(find, size, mesh=mesh):
        assert (batch_size, total) == (largest, size)
        assert sizes == [rows for rows in (64, 32, 16, 8) if rows >= largest]


def test_a_loop_reads_the_norm_and_unscales_after_a_window_was_left_out():
    def train(ctx):
        model, windows = setup(ctx, "dp_replicate=2")
        opt = faccel.wrap_optimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, ctx)
        fn = Fault(OSError("no file"), 1, 0, "forward").loss_fn if ctx.rank == 1 else loss_fn
        scaler, norms = faccel.init_scaler(ctx), []
        for window in windows:
            _, scaler = faccel.forward_backward(fn, model, window, scaler, ctx, skip=(OSError,))
            scaler = faccel.unscale(opt, scaler, ctx)
            info, scaler = faccel.optimizer_step(opt, scaler, ctx, clip_norm=1.0)
            norms.append(info.grad_norm.item())
        return norms

    first, second, third = simulate(train, 2, config={"mixed_precision": "fp16"})[0]
    assert first == 0 and second > 0 and third > 0


def step_with(opt, error):
    """Let the optimizer raise."""

    def hook(*args):
        raise error

    opt.register_step_pre_hook(hook)


# (where it is raised, exception, arguments of `forward_backward`, part of the fix)
FIXES = {
    "an exception": ("forward", KeyError("label"), {}, "`skip=(KeyError,)`"),
    "in backward": ("backward", KeyError("label"), {}, "`skip=(KeyError,)`"),
    "of faccel": ("forward", DataError("bad"), {}, "`skip=(faccel.errors.DataError,)`"),
    "with a fix": ("forward", DataError("bad", fix="read it again"), {}, "on that rank, read it"),
    "another class": ("forward", KeyError(1), {"skip": (OSError,)}, "`skip=(KeyError,)`"),
    "out of memory": ("forward", OOM, {}, "`retry=faccel.Retry()`"),
    "the smallest": ("forward", OOM, {"retry": faccel.Retry(at_least=8)}, "cannot get smaller"),
    "the optimizer": ("optimizer", KeyError("exp_avg"), {}, "load a checkpoint"),
}


@pytest.mark.parametrize("name", FIXES)
def test_the_error_of_the_other_ranks_has_a_fix_that_works(name):
    where, error, policy, expected = FIXES[name]

    def train(ctx, policy):
        model, windows = setup(ctx, "dp_replicate=2")
        opt = faccel.wrap_optimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, ctx)
        fn = loss_fn
        if ctx.rank == 1 and where == "optimizer":
            step_with(opt, error)
        elif ctx.rank == 1:
            fn = Fault(error, 1, 1, where).loss_fn
        scaler = faccel.init_scaler(ctx)
        try:
            for window in windows:
                _, scaler = faccel.forward_backward(fn, model, window, scaler, ctx, **policy)
                _, scaler = faccel.optimizer_step(opt, scaler, ctx)
        except (RankFailedError, type(error)) as caught:
            return caught
        return None

    failure, cause = simulate(train, 2, policy)
    assert cause is error and isinstance(failure, RankFailedError)
    assert expected in failure.fix
    # the line that has raised, not that of `forward_backward`
    frame = traceback.extract_tb(cause.__traceback__)[-1]
    site = f"{os.path.relpath(frame.filename)}:{frame.lineno}"
    assert failure.got.endswith(site)
    if "=" in expected:
        keyword, _, value = expected.strip("`").partition("=")
        assert simulate(train, 2, {keyword: eval(value)}) == (None, None)


@pytest.mark.parametrize("mesh", ["dp_replicate=2", "dp_shard=2"])
@pytest.mark.parametrize("reduced", [True, False])
def test_a_window_runs_again_unless_gradients_of_an_earlier_backward_would_be_lost(mesh, reduced):
    def train(ctx, clears):
        model, windows = setup(ctx, mesh)
        opt = faccel.wrap_optimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, ctx)
        scaler = faccel.init_scaler(ctx)
        with faccel.grad_sync(model, on=reduced):
            loss = model(torch.ones(1, WIDTH).double()).sum()
            scaler = faccel.scaled_backward(loss, scaler, ctx)
        if clears:
            opt.zero_grad()
        fn = Fault(OOM, 1, 1, "forward").loss_fn if ctx.rank == 1 else loss_fn
        try:
            _, scaler = faccel.forward_backward(
                fn, model, next(windows), scaler, ctx, retry=faccel.Retry()
            )
        except (RankFailedError, torch.OutOfMemoryError) as error:
            return error
        return scaler.max_rows

    failure, cause = simulate(train, 2, False, mesh=mesh)
    assert cause is OOM and "after another backward" in failure.fix
    rows = ROWS // SIZE // 2 // 2
    assert simulate(train, 2, True, mesh=mesh) == (rows, rows)


@pytest.mark.parametrize("name", ["retry", "find_batch_size"])
def test_ranks_that_cannot_leave_their_collectives_raise_before_they_run(name):
    def call(ctx):
        if name == "find_batch_size":
            return faccel.find_batch_size(lambda rows: None, ctx, start=8)
        model, windows = setup(ctx, "dp_replicate=2")
        window, scaler = next(windows), faccel.init_scaler(ctx)
        losses, _ = faccel.forward_backward(
            loss_fn, model, window, scaler, ctx, retry=faccel.Retry()
        )
        return len(losses)

    with pytest.raises(ConfigError) as caught:
        simulate(call, 2, config={"debug": True})
    assert caught.value.got == "debug=True" and "`faccel.init(debug=False)`" in caught.value.fix
    assert simulate(call, 2, config={"debug": False})[0] > 0


def test_a_second_model_that_the_loss_reaches_has_the_gradients_of_one_attempt():
    def train(ctx, fails):
        torch.manual_seed(0)
        model = faccel.wrap(nn.Linear(WIDTH, WIDTH), ctx)
        critic = faccel.wrap(nn.Sequential(nn.Linear(WIDTH, 1), nn.BatchNorm1d(1)), ctx)
        calls = []

        def loss_fn(net, batch):
            calls.append(1)
            if fails and ctx.rank == 1 and len(calls) == SIZE:
                raise OOM
            return critic(net(batch.data)).square().mean()

        loader = faccel.shard(
            DataLoader(torch.linspace(0, 1, ROWS * WIDTH).view(-1, WIDTH), 4), ctx
        )
        window = next(faccel.windows(loader, ctx, size=SIZE))
        scaler = attrs.evolve(faccel.init_scaler(ctx), max_rows=None if fails else 2)
        faccel.forward_backward(loss_fn, model, window, scaler, ctx, retry=faccel.Retry())
        return gradients(critic), dict(critic.named_buffers())

    again, expected = simulate(train, 2, True), simulate(train, 2, False)
    for (grads, buffers), (other_grads, other_buffers) in zip(again, expected, strict=True):
        assert all(torch.equal(grads[name], other_grads[name]) for name in other_grads)
        assert all(torch.equal(buffers[name], other_buffers[name]) for name in other_buffers)


def test_a_checkpoint_keeps_the_size_of_micro_batches(tmp_path):
    def train(ctx):
        model, windows = setup(ctx, "dp_replicate=2")
        fn = Fault(OOM, 1, 0, "forward").loss_fn if ctx.rank == 1 else loss_fn
        window, scaler = next(windows), faccel.init_scaler(ctx)
        _, scaler = faccel.forward_backward(
            fn, model, window, scaler, ctx, retry=faccel.Retry(split=4)
        )
        faccel.save({"scaler": scaler}, tmp_path, ctx, step=1)
        loaded = faccel.load({"scaler": faccel.init_scaler(ctx)}, tmp_path, ctx)["scaler"]
        losses, _ = faccel.forward_backward(loss_fn, model, window, loaded, ctx)
        return loaded.max_rows, len(losses)

    assert simulate(train, 2) == ((1, 4 * SIZE),) * 2


@pytest.mark.parametrize("rows", [0, -1, 2.5, "4", True])
def test_a_size_of_micro_batches_is_a_positive_int(rows):
    with pytest.raises(ConfigError, match="max_rows"):
        faccel.ScalerState(max_rows=rows)


@pytest.mark.parametrize("mesh", MESHES)
def test_a_loop_that_continues_after_its_optimizer_failed_has_no_old_gradients(mesh):
    def train(ctx, fails):
        model, windows = setup(ctx, mesh)
        opt = faccel.wrap_optimizer(torch.optim.SGD(model.parameters(), lr=0), model, ctx)
        fn = Fault(OOM, 1, SIZE, "forward").loss_fn if ctx.rank == 1 else loss_fn
        scaler = faccel.init_scaler(ctx)
        _, scaler = faccel.forward_backward(fn, model, next(windows), scaler, ctx)
        if fails:
            # on all ranks, as where each checks its loss
            handle = opt.register_step_pre_hook(lambda *args: {}["label"])
            with pytest.raises((KeyError, RankFailedError)):
                faccel.optimizer_step(opt, scaler, ctx)
            handle.remove()
        else:
            _, scaler = faccel.optimizer_step(opt, scaler, ctx)
        torch.manual_seed(3)
        _, scaler = faccel.forward_backward(
            fn, model, next(windows), scaler, ctx, retry=faccel.Retry()
        )
        return scaler.max_rows, gradients(model)

    size = faccel.MeshSpec.of(mesh).size
    for (rows, grads), (expected_rows, expected) in zip(
        simulate(train, size, True, mesh=mesh), simulate(train, size, False, mesh=mesh), strict=True
    ):
        assert rows == expected_rows is not None and grads.keys() == expected.keys()
        assert all(torch.equal(grads[name], expected[name]) for name in grads)


def test_stages_find_their_shapes_again_after_a_failure():
    def train(ctx):
        model, windows = setup(ctx, "pp=2")
        opt = faccel.wrap_optimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, ctx)
        fn = Fault(DataError("bad"), 0, SIZE, "forward").loss_fn if ctx.rank == 0 else loss_fn
        scaler, num_losses = faccel.init_scaler(ctx), []
        for window in windows:
            losses, scaler = faccel.forward_backward(
                fn, model, window, scaler, ctx, skip=(DataError,)
            )
            _, scaler = faccel.optimizer_step(opt, scaler, ctx)
            num_losses.append(len(losses))
            if len(num_losses) == 1 and ctx.rank == 1:
                # as if the failure had interrupted the exchange of shapes on this rank
                model.engine._metas.clear()
        return num_losses

    assert simulate(train, 2, mesh="pp=2") == ([SIZE, 0, SIZE],) * 2


def test_a_rank_whose_engine_has_its_own_groups_ends_without_waiting_for_the_others():
    def train(ctx):
        # as DeepSpeed
        parallelism = attrs.evolve(ctx.parallelism, optimizer_step=lambda *args: None)
        ctx = attrs.evolve(ctx, parallelism=parallelism)
        model, windows = setup(ctx, "dp_replicate=2")
        fn = Fault(KeyError("label"), 1, 1, "forward").loss_fn if ctx.rank == 1 else loss_fn
        try:
            faccel.forward_backward(fn, model, next(windows), faccel.init_scaler(ctx), ctx)
        finally:
            num_rounds.append(ctx.comm.recovery._num_rounds)

    num_rounds = []
    with pytest.raises(KeyError):
        simulate(train, 2)
    assert num_rounds == [0, 0]
