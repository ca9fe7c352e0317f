"""Parameters of a Megatron-core model have the names of the full model, on every mesh."""

import os

import pytest
import torch

import faccel
from faccel.backends.table import BACKENDS
from tests.procs.test_megatron import full, full_state, loss_of, on, prepared, rows, train

REASON = BACKENDS["megatron"].probe(os.environ)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(REASON is not None, reason=f"Megatron-core cannot run here: {REASON}"),
]


def averages(ctx, folder):
    model, opt = prepared(ctx)
    ema = faccel.parallel.init_ema(model, ctx, decay=0.5)
    before = full_state(model)
    train(ctx, model, opt, stop=1)
    after = full_state(model)
    ema = faccel.parallel.update_ema(ema, model, ctx)
    faccel.save({"ema": ema}, folder, ctx, step=1)
    loss = loss_of_averages(ctx, model, ema)
    # The parameters are those of the training again.
    assert all(torch.equal(value, after[name]) for name, value in full_state(model).items())
    return loss, {name: (before[name] + after[name]) / 2 for name in before}


def loss_of_averages(ctx, model, ema):
    with faccel.parallel.ema_weights(model, ema, ctx), torch.no_grad():
        return loss_of(model, rows(0, 2)).item()


def loads(ctx, folder):
    model, _ = prepared(ctx)
    ema = faccel.load({"ema": faccel.parallel.init_ema(model, ctx)}, folder, ctx)["ema"]
    values = {name: full(average) for name, average in ema.averages.items()}
    return loss_of_averages(ctx, model, ema), values


@pytest.mark.parametrize("mesh", ["pp=2", "tp=2"])
def test_averages_of_a_mesh_load_on_one_process(mesh, tmp_path):
    (loss, first), (other_loss, second) = on(2, averages, tmp_path, mesh=mesh)
    ((loaded_loss, loaded),) = on(1, loads, tmp_path)
    assert (loaded_loss, loaded_loss) == pytest.approx((loss, other_loss), abs=1e-5)
    expected = first | second
    assert loaded.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(loaded[name], value, atol=1e-6, rtol=0)


def gathers(ctx):
    model, _ = prepared(ctx)
    state = full_state(model)
    with faccel.parallel.gathered(model, ctx) as params:
        read = {name: param.detach().clone() for name, param in params.items()}
    with faccel.parallel.gathered(model, ctx, modifier_rank=0) as params:
        for number, param in enumerate(params.values()):
            torch.nn.init.constant_(param, number)
    written = {name: value.unique().tolist() for name, value in full_state(model).items()}
    return state, read, written


@pytest.mark.parametrize("mesh", ["pp=2", "tp=2"])
def test_gathered_parameters_are_those_of_all_stages(mesh):
    results = on(2, gathers, mesh=mesh)
    expected = results[0][0] | results[1][0]
    for _, read, written in results:
        assert read.keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in read.items())
        numbers = {name: [number] for number, name in enumerate(read)}
        assert written == {name: numbers[name] for name in written}
