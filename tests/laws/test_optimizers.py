"""Laws of every optimizer of `faccel.func`: equal to `torch.optim` bit for bit, and traceable."""

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
IDS = [f"{make.__name__}-{'-'.join(options) or 'plain'}" for make, _, options in CASES]
LR = 0.01


def draw(make, seed, dtype=torch.float32):
    names = MATRICES if make is func.muon else SHAPES
    generator = torch.Generator().manual_seed(seed)
    return TensorDict(
        {name: torch.randn(SHAPES[name], generator=generator, dtype=dtype) for name in names}
    )


def trained(make, options, num_steps=100, scheduled=False, donate=False):
    optimizer = make(LR, **options)
    if scheduled:
        optimizer = func.chain(func.scale_by_schedule(lambda count: 0.97**count), optimizer)
    params = draw(make, 0)
    state = optimizer.init(params)
    for i in range(num_steps):
        updates, state = optimizer.update(Updates(draw(make, i + 1), donate=donate), state, params)
        params = func.apply_updates(params, updates)
    return params


def trained_by_torch(make, torch_class, options, num_steps=100, scheduled=False):
    params = {name: nn.Parameter(value) for name, value in draw(make, 0).items()}
    optimizer = torch_class(params.values(), lr=LR, **options)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda count: 0.97**count if scheduled else 1.0
    )
    for i in range(num_steps):
        for name, grad in draw(make, i + 1).items():
            params[name].grad = grad
        optimizer.step()
        scheduler.step()
    return params


@pytest.mark.parametrize(("make", "torch_class", "options"), CASES, ids=IDS)
@pytest.mark.parametrize("how", ["plain", "scheduled", "donated"])
def test_a_hundred_steps_equal_pytorch_bit_for_bit(make, torch_class, options, how):
    got = trained(make, options, scheduled=how == "scheduled", donate=how == "donated")
    want = trained_by_torch(make, torch_class, options, scheduled=how == "scheduled")
    for name, value in want.items():
        assert torch.equal(got[name], value), name


@pytest.mark.parametrize(("make", "torch_class", "options"), CASES, ids=IDS)
def test_an_update_does_not_write_to_its_arguments(make, torch_class, options):
    optimizer, params, grads = make(LR, **options), draw(make, 0), draw(make, 1)
    _, state = optimizer.update(grads, optimizer.init(params), params)
    before = params.clone(), grads.clone(), state.clone()
    optimizer.update(grads, state, params)
    for old, new in zip(before, (params, grads, state), strict=True):
        assert (old == new).all()


@pytest.mark.parametrize(("make", "torch_class", "options"), CASES, ids=IDS)
def test_a_vmapped_update_equals_separate_ones(make, torch_class, options):
    optimizer, dtype = make(LR, **options), torch.float64
    tolerance = 2e-2 if make is func.muon else 1e-12  # Muon multiplies in bfloat16
    alone = [draw(make, i, dtype) for i in range(3)]
    states = [optimizer.init(params) for params in alone]
    together = _stacked([dict(params.items()) for params in alone])
    together_state = _stacked([func.tensordicts.to_dict(state) for state in states])

    def one(params, grads, state):
        updates, state = optimizer.update(
            TensorDict(grads), func.tensordicts.to_tensordict(state), TensorDict(params)
        )
        return dict(updates.params.items()), func.tensordicts.to_dict(state)

    for i in range(5):
        grads = [draw(make, 10 * i + j, dtype) for j in range(3)]
        batch = _stacked([dict(grad.items()) for grad in grads])
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


@pytest.mark.parametrize(("make", "torch_class", "options"), CASES, ids=IDS)
def test_gradients_pass_through_an_update(make, torch_class, options):
    optimizer, params, grads = (
        make(LR, **options),
        draw(make, 0, torch.float64),
        draw(make, 1, torch.float64),
    )
    state = optimizer.init(params)

    def length(params):
        updates, _ = optimizer.update(grads, state, TensorDict(params))
        return sum(param.square().sum() for param in updates.params.values())

    slope = torch.func.grad(length)(dict(params.items()))
    for name, value in slope.items():
        step = 1e-5 * torch.ones_like(value)
        values = dict(params.items())
        if make is not func.muon and make is not func.adafactor:  # bfloat16; a minimum of two rates
            rise = length(values | {name: values[name] + step}) - length(
                values | {name: values[name] - step}
            )
            assert torch.isclose(rise / 2e-5, value.sum(), rtol=1e-4, atol=1e-6), name
        assert value.isfinite().all()
