"""A checkpoint of any layout loads on any other, and the run goes on as one process would have."""

import itertools

import pytest
import torch

import faccel
from faccel.testing import simulate
from tests.models import loss_of, model, tokens
from tests.training import TIED, full, plan_of

MESHES = ("dp_replicate=1", "dp_replicate=2", "dp_shard=2", "dp_shard=3", "dp_shard=2,tp=2",
          "dp_replicate=2,dp_shard=2", "pp=2", "pp=2,dp_shard=2", "pp=3")  # fmt: skip
ROWS = 12
pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own advice on layouts


def updates(ctx, wrapped, opt, seeds):
    scaler = faccel.init_scaler(ctx)
    for seed in seeds:
        data = torch.utils.data.DataLoader(
            tokens(ROWS, seed=seed), ROWS // 3 // ctx.data_world_size or 1
        )
        window = next(faccel.windows(faccel.shard(data, ctx), ctx, size=ROWS))
        _, scaler = faccel.parallel.pipeline_step(
            lambda net, batch: loss_of(net(batch[:, :-1]), batch[:, 1:]),
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
    updates(ctx, wrapped, opt, range(2))
    faccel.save({"model": wrapped, "opt": opt, "step": 2}, path, ctx, step=2)
    updates(ctx, wrapped, opt, [7])
    return {name: full(p) for name, p in wrapped.named_parameters()}


def load(ctx, mesh, path):
    wrapped, opt = make(ctx, mesh, 1)
    updates(ctx, wrapped, opt, [9])  # states that are to be overwritten
    state = faccel.load({"model": wrapped, "opt": opt, "step": 0}, path, ctx)
    assert state["step"] == 2
    updates(ctx, wrapped, opt, [7])
    return {name: full(p) for name, p in wrapped.named_parameters()}


def close(ours, theirs):
    whole = {name: p for part in theirs for name, p in part.items()}
    for part in ours:
        for name, p in part.items():
            expected = whole.get(name, whole.get(TIED.get(name)))
            assert (p - expected).abs().max() < 1e-10, name


@pytest.mark.parametrize("saved", MESHES)
def test_every_layout_loads_on_every_other(saved, tmp_path):
    theirs = simulate(save, faccel.MeshSpec.of(saved).size, saved, str(tmp_path), mesh=saved)
    for loaded in MESHES:
        close(
            simulate(load, faccel.MeshSpec.of(loaded).size, loaded, str(tmp_path), mesh=loaded),
            theirs,
        )


@pytest.mark.parametrize("mesh", ["dp_shard=2", "dp_shard=2,tp=2", "dp_replicate=2,tp=2", "pp=2",
                                  "pp=2,dp_shard=2"])  # fmt: skip
def test_an_export_of_a_sharded_model_is_whole(mesh, tmp_path):
    def export(ctx):
        wrapped, opt = make(ctx, mesh, 0)
        updates(ctx, wrapped, opt, [3])
        faccel.checkpoint.export_model(wrapped, str(tmp_path), ctx)
        return {name: full(p) for name, p in wrapped.named_parameters()}

    parts = simulate(export, faccel.MeshSpec.of(mesh).size, mesh=mesh)
    trained = {name: p for part in parts[::-1] for name, p in part.items()}
    plain = model()

    def read(ctx):
        faccel.checkpoint.load_model(plain, str(tmp_path), ctx)

    simulate(read, 1)
    assert all(torch.equal(p, trained[name]) for name, p in plain.named_parameters())
    assert len(list(itertools.chain(tmp_path.glob("*.safetensors")))) == 1
