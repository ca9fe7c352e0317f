"""Memory by category: bytes by arithmetic on the shapes, on every layout."""

import pytest
import torch
from torch import nn

import faccel
from faccel.errors import ConfigError
from faccel.testing import fake_context, simulate
from faccel.tracking import peak_memory

DIM, LAYERS, FLOAT = 8, 4, 4
NUM_PARAMS = LAYERS * DIM * (DIM + 1)


def net():
    return nn.Sequential(*[nn.Linear(DIM, DIM) for _ in range(LAYERS)])


def after_a_step(ctx, opt_class=torch.optim.AdamW, **options):
    """Return the memory after one update."""
    model = faccel.wrap(net(), ctx)
    opt = faccel.wrap_optimizer(opt_class(model.parameters(), lr=0.1, **options), model, ctx)
    scaler = faccel.init_scaler(ctx)
    scaler = faccel.scaled_backward(model(torch.ones(2, DIM)).sum(), scaler, ctx)
    faccel.optimizer_step(opt, scaler, ctx)
    return peak_memory({"model": model, "opt": opt, "step": 1}, ctx, peak_bytes=10**6)


# How many ranks a parameter and an optimizer state are sharded over.
LAYOUTS = {
    "dp_replicate=2": (1, 1),
    "dp_shard=2": (2, 2),
    "dp_shard=4": (4, 4),
    "dp_replicate=2,dp_shard=2": (2, 2),
}
SIZES = {"dp_replicate=2": 2, "dp_shard=2": 2}


@pytest.mark.parametrize("mesh", LAYOUTS)
def test_a_rank_counts_what_it_holds(mesh):
    num_shards, _ = LAYOUTS[mesh]
    (memory, *_) = simulate(after_a_step, SIZES.get(mesh, 4), mesh=mesh)
    share = NUM_PARAMS * FLOAT // num_shards
    steps = 2 * LAYERS * FLOAT  # Adam counts the steps of each parameter
    assert (memory.parameters, memory.gradients) == (share, share)
    assert memory.optimizer == 2 * share + steps
    assert memory.activations == 10**6 - 4 * share - steps


OPTIMIZERS = {
    "no state": (torch.optim.SGD, {}, 0),
    "momentum": (torch.optim.SGD, {"momentum": 0.9}, NUM_PARAMS * FLOAT),
    "Adam": (torch.optim.Adam, {}, 2 * NUM_PARAMS * FLOAT + 2 * LAYERS * FLOAT),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_states_count_after_the_first_step(name):
    opt_class, options, expected = OPTIMIZERS[name]
    assert after_a_step(fake_context(0, 1), opt_class, **options).optimizer == expected


def test_frozen_parameters_have_no_gradient_and_tied_ones_count_once():
    model = net().to(torch.bfloat16)
    model[0].requires_grad_(requires_grad=False)
    model[1].weight = model[2].weight
    memory = peak_memory([model, nn.BatchNorm1d(3)], fake_context(0, 1))
    layer, norm = 2 * DIM * (DIM + 1), 2 * 3 * FLOAT
    tied = 2 * DIM * DIM
    assert memory.parameters == 4 * layer - tied + norm + (2 * 3 * FLOAT + 8)
    assert memory.gradients == 3 * layer - tied + norm


def test_the_memory_of_activations_is_unknown_on_the_cpu_and_never_negative():
    ctx, model = fake_context(0, 1), net()
    assert peak_memory(model, ctx).activations is None
    assert peak_memory(model, ctx).peak is None
    assert peak_memory(model, ctx, peak_bytes=1).activations == 0


def test_tensors_on_another_device_do_not_count():
    assert peak_memory(net().to("meta"), fake_context(0, 1)).parameters == 0


@pytest.mark.parametrize("state", [{}, {"x": torch.ones(3)}, 3], ids=str)
def test_a_state_without_a_model_is_an_error(state):
    with pytest.raises(ConfigError, match="neither a model nor an optimizer"):
        peak_memory(state, fake_context(0, 1))
