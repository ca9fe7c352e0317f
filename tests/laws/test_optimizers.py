"""Laws of every optimizer of `faccel.func`: it is torch's, bit for bit, and its formula is its kernel."""

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from faccel import func
from faccel.func.gradient_transformation import Updates

SHAPES = {"tall": (7, 3), "wide": (3, 7), "matrix": (5, 5), "vector": (6,), "number": ()}
MATRICES = ("tall", "wide", "matrix")
CASES = [
    (func.sgd, torch.optim.SGD, {}),
    (func.sgd, torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}),
    (func.sgd, torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    (func.sgd, torch.optim.SGD, {"momentum": 0.9, "dampening": 0.5, "maximize": True}),
    (func.sgd, torch.optim.SGD, {"momentum": 0.9, "foreach": True}),
    (func.sgd, torch.optim.SGD, {"momentum": 0.9, "fused": True}),
    (func.adam, torch.optim.Adam, {}),
    (func.adam, torch.optim.Adam, {"weight_decay": 0.1, "amsgrad": True, "maximize": True}),
    (func.adamw, torch.optim.AdamW, {}),
    (func.adamw, torch.optim.AdamW, {"betas": (0.8, 0.95), "weight_decay": 0.3, "amsgrad": True}),
    (func.adamw, torch.optim.AdamW, {"foreach": True}),
    (func.adamw, torch.optim.AdamW, {"fused": True}),
    (func.adagrad, torch.optim.Adagrad, {}),
    (
        func.adagrad,
        torch.optim.Adagrad,
        {"lr_decay": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.1},
    ),
    (func.rmsprop, torch.optim.RMSprop, {}),
    (func.rmsprop, torch.optim.RMSprop, {"momentum": 0.9, "centered": True, "weight_decay": 0.1}),
    (func.adafactor, torch.optim.Adafactor, {}),
    (func.adafactor, torch.optim.Adafactor, {"weight_decay": 0.1, "d": 2.0, "eps": (1e-6, 1e-2)}),
    (func.muon, torch.optim.Muon, {}),
    (func.muon, torch.optim.Muon, {"nesterov": False, "adjust_lr_fn": "match_rms_adamw"}),
]
IDS = [f"{ours.__name__}-{'-'.join(options) or 'plain'}" for ours, _, options in CASES]
LR = 0.01


def draw(ours, seed, dtype=torch.float32):
    names = MATRICES if ours is func.muon else SHAPES
    generator = torch.Generator().manual_seed(seed)
    return TensorDict(
        {name: torch.randn(SHAPES[name], generator=generator, dtype=dtype) for name in names}
    )


def trained(ours, options, num_steps=100, scheduled=False, donate=False):
    optimizer = ours(LR, **options)
    if scheduled:
        optimizer = func.chain(func.scale_by_schedule(lambda count: 0.97**count), optimizer)
    params = draw(ours, 0)
    state = optimizer.init(params)
    for i in range(num_steps):
        updates, state = optimizer.update(Updates(draw(ours, i + 1), donate=donate), state, params)
        params = func.apply_updates(params, updates)
    return params


def trained_by_torch(ours, theirs, options, num_steps=100, scheduled=False):
    params = {name: nn.Parameter(value) for name, value in draw(ours, 0).items()}
    optimizer = theirs(params.values(), lr=LR, **options)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda count: 0.97**count if scheduled else 1.0
    )
    for i in range(num_steps):
        for name, grad in draw(ours, i + 1).items():
            params[name].grad = grad
        optimizer.step()
        scheduler.step()
    return params


@pytest.mark.parametrize(("ours", "theirs", "options"), CASES, ids=IDS)
@pytest.mark.parametrize("how", ["plain", "scheduled", "donated"])
def test_a_hundred_steps_are_torchs_bit_for_bit(ours, theirs, options, how):
    got = trained(ours, options, scheduled=how == "scheduled", donate=how == "donated")
    want = trained_by_torch(ours, theirs, options, scheduled=how == "scheduled")
    for name, value in want.items():
        assert torch.equal(got[name], value), name


@pytest.mark.parametrize(("ours", "theirs", "options"), CASES, ids=IDS)
def test_an_update_writes_nothing_that_it_was_given(ours, theirs, options):
    optimizer, params, grads = ours(LR, **options), draw(ours, 0), draw(ours, 1)
    _, state = optimizer.update(grads, optimizer.init(params), params)
    before = params.clone(), grads.clone(), state.clone()
    optimizer.update(grads, state, params)
    for old, new in zip(before, (params, grads, state), strict=True):
        assert (old == new).all()


@pytest.mark.parametrize(("ours", "theirs", "options"), CASES, ids=IDS)
def test_under_vmap_each_model_is_trained_as_alone(ours, theirs, options):
    optimizer, dtype = ours(LR, **options), torch.float64
    tolerance = 2e-2 if ours is func.muon else 1e-12  # Muon multiplies in bfloat16
    alone = [draw(ours, i, dtype) for i in range(3)]
    states = [optimizer.init(params) for params in alone]
    together = _stacked([dict(params.items()) for params in alone])
    together_state = _stacked([func.tensordicts.to_dict(state) for state in states])

    def one(params, grads, state):
        updates, state = optimizer.update(
            TensorDict(grads), func.tensordicts.to_tensordict(state), TensorDict(params)
        )
        return dict(updates.params.items()), func.tensordicts.to_dict(state)

    for i in range(5):
        grads = [draw(ours, 10 * i + j, dtype) for j in range(3)]
        batch = _stacked([dict(each.items()) for each in grads])
        together, together_state = torch.vmap(one)(together, batch, together_state)
        for j in range(3):
            updates, states[j] = optimizer.update(grads[j], states[j], alone[j])
            alone[j] = updates.params
    for j in range(3):
        for name, value in alone[j].items():
            assert torch.allclose(together[name][j], value, rtol=0, atol=tolerance), name


def _stacked(trees):
    if isinstance(trees[0], torch.Tensor):
        return torch.stack(trees)
    return {name: _stacked([tree[name] for tree in trees]) for name in trees[0]}


@pytest.mark.parametrize(("ours", "theirs", "options"), CASES, ids=IDS)
def test_gradients_pass_through_an_update(ours, theirs, options):
    optimizer, params, grads = (
        ours(LR, **options),
        draw(ours, 0, torch.float64),
        draw(ours, 1, torch.float64),
    )
    state = optimizer.init(params)

    def length(named):
        updates, _ = optimizer.update(grads, state, TensorDict(named))
        return sum(each.square().sum() for each in updates.params.values())

    slope = torch.func.grad(length)(dict(params.items()))
    for name, value in slope.items():
        step = 1e-5 * torch.ones_like(value)
        named = dict(params.items())
        if ours is not func.muon and ours is not func.adafactor:  # bfloat16; a minimum of two rates
            rise = length(named | {name: named[name] + step}) - length(
                named | {name: named[name] - step}
            )
            assert torch.isclose(rise / 2e-5, value.sum(), rtol=1e-4, atol=1e-6), name
        assert value.isfinite().all()
