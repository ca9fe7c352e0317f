"""A checkpoint of any layout loads on any other, and training continues as on one process."""

import itertools

import pytest
import torch

import faccel
from faccel.testing import simulate
from tests.models import loss_of, model, tokens
from tests.training import TIED, full, plan_of

MESHES = ("dp_replicate=1", "dp_replicate=2", "dp_shard=2", "dp_shard=3", "dp_shard=2,tp=2",
          "dp_replicate=2,dp_shard=2", "pp=2", "pp=2,dp_shard=2", "pp=3")  # fmt: skip
# Each layout is saved once and loaded once in the fast tests; all other pairs are slow tests.
NEXT = [(saved, MESHES[(index + 4) % len(MESHES)]) for index, saved in enumerate(MESHES)]
OTHERS = [pair for pair in itertools.product(MESHES, MESHES) if pair not in NEXT]
ROWS = 12
pytestmark = pytest.mark.filterwarnings("ignore")  # advice of torch on layouts


def updates(ctx, wrapped, opt, seeds):
    scaler = faccel.init_scaler(ctx)
    for seed in seeds:
        data = torch.utils.data.DataLoader(
            tokens(ROWS, seed=seed), ROWS // 3 // ctx.data_world_size or 1
        )
        window = next(faccel.windows(faccel.shard(data, ctx), ctx, size=ROWS))
        _, scaler = faccel.forward_backward(
            lambda net, batch: loss_of(net(batch.data[:, :-1]), batch.data[:, 1:]),
            wrapped,
            window,
            scaler,
            ctx,
        )
        faccel.optimizer_step(opt, scaler, ctx)


def make(ctx, mesh, seed):
    torch.manual_seed(seed)
    net = model()
    if seed:
        torch.nn.init.normal_(net.head.weight)
    wrapped = faccel.wrap(net, ctx, plan=plan_of(mesh))
    opt = faccel.wrap_optimizer(torch.optim.AdamW(wrapped.parameters(), lr=0.01), wrapped, ctx)
    return wrapped, opt


def save(ctx, mesh, path):
    wrapped, opt = make(ctx, mesh, 0)
    updates(ctx, wrapped, opt, [0, 1])
    faccel.save({"model": wrapped, "opt": opt, "step": 2}, path, ctx, step=2)
    updates(ctx, wrapped, opt, [7])
    return {name: full(p) for name, p in wrapped.named_parameters()}


def load(ctx, mesh, path):
    wrapped, opt = make(ctx, mesh, 1)
    updates(ctx, wrapped, opt, [9])  # so that there are states to overwrite
    state = faccel.load({"model": wrapped, "opt": opt, "step": 0}, path, ctx)
    assert state["step"] == 2
    updates(ctx, wrapped, opt, [7])
    return {name: full(p) for name, p in wrapped.named_parameters()}


def assert_close(params_by_rank, expected_by_rank):
    # Ranks of a pipeline have different parameters: together they have all of them.
    full_model = {}
    for params in expected_by_rank:
        full_model |= params
    for params in params_by_rank:
        for name, param in params.items():
            expected = full_model.get(name, full_model.get(TIED.get(name)))
            assert (param - expected).abs().max() < 1e-10, name


def check_save_and_load(saved, loaded, path):
    expected = simulate(save, faccel.MeshSpec.of(saved).size, saved, path, mesh=saved)
    resumed = simulate(load, faccel.MeshSpec.of(loaded).size, loaded, path, mesh=loaded)
    assert_close(resumed, expected)


@pytest.mark.parametrize(("saved", "loaded"), NEXT)
def test_a_layout_loads_on_another_layout(saved, loaded, tmp_path):
    check_save_and_load(saved, loaded, str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize(("saved", "loaded"), OTHERS)
def test_every_layout_loads_on_every_layout(saved, loaded, tmp_path):
    check_save_and_load(saved, loaded, str(tmp_path))


SLOW = pytest.mark.slow


@pytest.mark.parametrize("mesh", [
    pytest.param("dp_shard=2", marks=SLOW), "dp_shard=2,tp=2",
    pytest.param("dp_replicate=2,tp=2", marks=SLOW), pytest.param("pp=2", marks=SLOW),
    "pp=2,dp_shard=2",
])  # fmt: skip
def test_an_export_of_a_sharded_model_has_full_tensors(mesh, tmp_path):
    def export(ctx):
        wrapped, opt = make(ctx, mesh, 0)
        updates(ctx, wrapped, opt, [3])
        faccel.checkpoint.export_model(wrapped, str(tmp_path), ctx)
        return {name: full(p) for name, p in wrapped.named_parameters()}

    trained = {}
    for params in reversed(simulate(export, faccel.MeshSpec.of(mesh).size, mesh=mesh)):
        trained |= params
    plain = model()

    def read(ctx):
        faccel.checkpoint.load_model(plain, str(tmp_path), ctx)

    simulate(read, 1)
    assert all(torch.equal(p, trained[name]) for name, p in plain.named_parameters())
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
