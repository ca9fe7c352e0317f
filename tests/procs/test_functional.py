"""The functional core in real processes: results equal one process, memory equals `wrap`."""

import gc

import pytest
import torch

import faccel
from faccel import func
from faccel.testing import fake_context
from tests import functional
from tests.memory import DeepNet, status
from tests.procs.test_memory import DEPTH, PARAMETERS, WIDTH, reset_peak, train
from tests.ranks import run_ranks


def trained(ctx):
    return {name: tensor.tolist() for name, tensor in functional.run(ctx)[0].items()}


def ensemble(ctx):
    model, optimizer = functional.net(), func.sgd(0.5)
    state = func.init_state(model, optimizer, ctx, seed=0)
    step = func.ensemble(func.make_step(functional.loss_of(model), optimizer, ctx), ctx)
    _, states = step(func.stack([state, state]), functional.batch_of(0, ctx))
    return states.params["first.weight"].tolist()


@pytest.mark.parametrize("world_size", [2, 4])
def test_over_gloo_a_step_equals_one_process(world_size):
    expected = trained(fake_context(0, 1))
    for tensors in run_ranks(trained, world_size):
        for name, value in expected.items():
            assert torch.allclose(
                torch.tensor(tensors[name]), torch.tensor(value), rtol=0, atol=1e-12
            ), name


def test_over_gloo_an_ensemble_equals_one_process():
    expected = torch.tensor(ensemble(fake_context(0, 1)))
    for weight in run_ranks(ensemble, 2):
        assert torch.allclose(torch.tensor(weight), expected, rtol=0, atol=1e-12)


def compiled(ctx):
    model, optimizer = functional.net(), functional.transformation()
    step = func.make_step(functional.loss_of(model), optimizer, ctx)
    graph = torch.compile(step, fullgraph=True, backend="aot_eager")
    state = eager_state = func.init_state(model, optimizer, ctx, seed=3)
    for i in range(3):
        _, state = graph(state, functional.batch_of(i, ctx))
        _, eager_state = step(eager_state, functional.batch_of(i, ctx))
    return max(
        (p - q).abs().max().item()
        for p, q in zip(state.params.values(), eager_state.params.values(), strict=True)
    )


@pytest.mark.slow
def test_over_gloo_a_compiled_step_equals_the_eager_one():
    assert max(run_ranks(compiled, 2)) < 1e-12


def train_functionally(model, ctx, x, *, donate, steps=2):
    optimizer = func.adamw(1e-3, fused=True)
    state = func.init_state(model, optimizer, ctx, seed=0)
    del model.layers[:]  # the state has its values; the code is in a model on meta
    with torch.device("meta"):
        code = DeepNet(WIDTH, DEPTH)
    reset_peak()
    # a bucket of 25 MB would be most of this model
    step = func.make_step(
        lambda p, b, g: func.functional_call(code, p, b).sum(),
        optimizer,
        ctx,
        donate=donate,
        bucket_cap_mb=4,
    )
    for _ in range(steps):
        _, state = step(state, x)


def peak(ctx, how):
    """Return the peak memory of training beyond that before it, in sizes of the parameters."""
    x = torch.ones(2, WIDTH)
    small = torch.nn.Linear(WIDTH, 4)
    train(faccel.wrap(small, ctx), ctx, x)
    optimizer = func.adamw(1e-3, fused=True)
    warm = func.init_state(small, optimizer, ctx, seed=0)
    func.make_step(lambda p, b, g: func.functional_call(small, p, b).sum(), optimizer, ctx)(warm, x)
    gc.collect()
    reset_peak()
    before = status("VmRSS")
    net = DeepNet(WIDTH, DEPTH)
    if how == "module":
        model = faccel.wrap(net, ctx)
        reset_peak()
        train(model, ctx, x)
    else:
        train_functionally(net, ctx, x, donate=how == "donated")
    return (status("VmHWM") - before) / PARAMETERS


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_donated_step_needs_the_memory_of_the_module_path(world_size):
    module, donated, pure = (
        max(run_ranks(peak, world_size, how)) for how in ("module", "donated", "pure")
    )
    assert donated < 1.1 * module, (donated, module)
    assert donated < pure
