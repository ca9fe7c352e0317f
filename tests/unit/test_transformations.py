"""Combinations of gradient transformations, and schedules, compared with PyTorch."""

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from faccel import func
from faccel.errors import OptimizerError
from faccel.func.gradient_transformation import Updates

SHAPES = {"a.weight": (3, 2), "a.bias": (3,), "b.weight": (2, 2)}


def draw(seed, **shapes):
    generator = torch.Generator().manual_seed(seed)
    return TensorDict(
        {n: torch.randn(s, generator=generator) for n, s in (shapes or SHAPES).items()}
    )


def walk(optimizer, num_steps=5, grads=None, donate=False):
    params = draw(0)
    state = optimizer.init(params)
    seen = []
    for i in range(num_steps):
        g = draw(i + 1) if grads is None else grads[i]
        updates, state = optimizer.update(Updates(g, donate=donate), state, params)
        params = func.apply_updates(params, updates)
        seen.append(params.clone())
    return params, state, seen


def by_torch(make, num_steps=5, clip=None, grads=None):
    params = {name: nn.Parameter(value) for name, value in draw(0).items()}
    optimizer = make(params)
    for i in range(num_steps):
        for name, grad in (draw(i + 1) if grads is None else grads[i]).items():
            params[name].grad = grad.clone()
        if clip:
            torch.nn.utils.clip_grad_norm_(params.values(), clip)
        optimizer.step()
    return params


def equal_dicts(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def equal(actual, expected):
    equal_dicts(dict(actual.items()), dict(expected.items()))


@pytest.mark.parametrize("donate", [False, True])
def test_clip_by_global_norm_equals_pytorch(donate):
    optimizer = func.chain(func.clip_by_global_norm(0.5), func.sgd(0.1))
    params, _, _ = walk(optimizer, donate=donate)
    equal(params, by_torch(lambda p: torch.optim.SGD(p.values(), lr=0.1), clip=0.5))


def test_partition_equals_parameter_groups_of_pytorch():
    groups = {
        "decay": func.adamw(1e-2, weight_decay=0.3),
        "rest": func.adamw(1e-3, weight_decay=0.0),
    }
    params, _, _ = walk(func.partition(groups, lambda n, p: "decay" if p.ndim > 1 else "rest"))

    def make(p):
        return torch.optim.AdamW(
            [
                {"params": [v for v in p.values() if v.ndim > 1], "lr": 1e-2, "weight_decay": 0.3},
                {"params": [v for v in p.values() if v.ndim < 2], "lr": 1e-3, "weight_decay": 0.0},
            ]
        )

    equal(params, by_torch(make))


def test_partition_with_muon_and_adamw_equals_two_optimizers():
    groups = {"matrices": func.muon(1e-2), "rest": func.adamw(1e-3)}
    optimizer = func.chain(
        func.clip_by_global_norm(1.0),
        func.partition(groups, {n: "rest" if "bias" in n else "matrices" for n in SHAPES}),
    )
    params, state, _ = walk(optimizer)
    expected = {name: nn.Parameter(value) for name, value in draw(0).items()}
    muon = torch.optim.Muon([p for n, p in expected.items() if "bias" not in n], lr=1e-2)
    adamw = torch.optim.AdamW([expected["a.bias"]], lr=1e-3)
    for i in range(5):
        for name, grad in draw(i + 1).items():
            expected[name].grad = grad
        torch.nn.utils.clip_grad_norm_(expected.values(), 1.0)
        muon.step()
        adamw.step()
    equal(params, expected)
    assert sorted(state["partition"]["rest"]["exp_avg"].keys()) == ["a.bias"]


@pytest.mark.parametrize(
    "mask", [("a.*",), {n: n.startswith("a") for n in SHAPES}, lambda n, p: n.startswith("a")]
)
def test_masked_leaves_other_parameters_unchanged(mask):
    params, _, _ = walk(func.masked(func.sgd(0.1), mask))
    assert torch.equal(params["b.weight"], draw(0)["b.weight"])
    assert not torch.equal(params["a.weight"], draw(0)["a.weight"])
    clip = func.masked(func.clip_by_global_norm(1e-3), mask)
    updates, _ = clip.update(draw(1), clip.init(draw(0)), draw(0))
    assert torch.equal(updates.grads["b.weight"], draw(1)["b.weight"])
    assert updates.grads["a.weight"].norm() < 1e-3


def test_partition_with_frozen_equals_masked():
    combined = func.partition(
        {"on": func.sgd(0.1), "off": func.frozen()}, lambda n, p: "on" if n[0] == "a" else "off"
    )
    equal(walk(combined)[0], walk(func.masked(func.sgd(0.1), ("a.*",)))[0])


@pytest.mark.parametrize("donate", [False, True])
def test_accumulate_equals_steps_with_the_mean_gradient(donate):
    optimizer = func.chain(
        func.accumulate(3), func.clip_by_global_norm(0.5), func.adamw(1e-2), func.ema(0.5)
    )
    _, state, seen = walk(optimizer, num_steps=6, donate=donate)
    means = []
    for i in (1, 4):
        grads = [draw(i), draw(i + 1), draw(i + 2)]
        means.append(TensorDict({n: (grads[0][n] + grads[1][n] + grads[2][n]) / 3 for n in SHAPES}))
    equal(seen[0], draw(0))
    equal(seen[1], draw(0))
    equal(
        seen[5],
        by_torch(lambda p: torch.optim.AdamW(p.values(), lr=1e-2), 2, clip=0.5, grads=means),
    )
    assert int(state["adamw"]["count"]) == 2
    assert int(state["accumulate"]["count"]) == 0


@pytest.mark.parametrize("donate", [False, True])
def test_skip_nonfinite_equals_a_run_without_the_bad_step(donate):
    bad = draw(2)
    bad["a.bias"][1] = float("inf")
    grads = [draw(1), bad, draw(3)]
    optimizer = func.chain(
        func.skip_nonfinite(), func.scale_by_schedule(lambda n: 0.5**n), func.adamw(1e-2)
    )
    params, state, _ = walk(optimizer, 3, grads=[g.clone() for g in grads], donate=donate)
    without = walk(
        func.chain(func.scale_by_schedule(lambda n: 0.5**n), func.adamw(1e-2)),
        2,
        grads=[grads[0], grads[2]],
    )
    equal(params, without[0])
    assert int(state["skip_nonfinite"]["num_skipped"]) == 1
    assert int(state["adamw"]["count"]) == int(state["scale_by_schedule"]["count"]) == 2


@pytest.mark.parametrize("donate", [False, True])
def test_ema_equals_pytorch(donate):
    _, state, _ = walk(func.chain(func.sgd(0.1), func.ema(0.9)), donate=donate)

    class Holder(nn.Module):
        def __init__(self, params):
            super().__init__()
            for name, p in params.items():
                self.register_parameter(name.replace(".", "_"), p)

    params = {name: nn.Parameter(value) for name, value in draw(0).items()}
    holder = Holder(params)
    averaged = AveragedModel(holder, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    averaged.n_averaged += (
        1  # PyTorch starts with the parameters after the first update, `ema` with the initial ones
    )
    optimizer = torch.optim.SGD(params.values(), lr=0.1)
    for i in range(5):
        for name, grad in draw(i + 1).items():
            params[name].grad = grad
        optimizer.step()
        averaged.update_parameters(holder)
    for name, value in func.ema_params(state).items():
        assert torch.equal(value, getattr(averaged.module, name.replace(".", "_"))), name


def test_skip_nonfinite_inside_of_a_partition_skips_only_its_label():
    bad = draw(1)
    bad["a.bias"][0] = float("nan")
    safe = func.chain(func.skip_nonfinite(), func.sgd(0.1))
    optimizer = func.partition({"a": safe, "b": safe}, lambda n, p: n[0])
    params, state, _ = walk(optimizer, 1, grads=[bad])
    assert torch.equal(params["a.weight"], draw(0)["a.weight"])
    assert torch.equal(params["b.weight"], draw(0)["b.weight"] - 0.1 * bad["b.weight"])
    assert [int(state[k]["skip_nonfinite"]["num_skipped"]) for k in "ab"] == [1, 0]


@pytest.mark.parametrize(
    "make",
    [
        lambda: func.chain(
            func.accumulate(2),
            func.clip_by_global_norm(0.5),
            func.adamw(func.cosine(6)),
            func.ema(0.5),
        ),
        lambda: func.chain(
            func.skip_nonfinite(), func.scale_by_schedule(func.linear(1.0, 0.0, 6)), func.sgd(0.1)
        ),
        lambda: func.partition(
            {"a": func.chain(func.clip_by_value(0.1), func.rmsprop()), "b": func.frozen()},
            lambda n, p: n[0],
        ),
        lambda: func.masked(func.adamw(0.1), ("a.*",)),
        lambda: func.partition({"a": func.adafactor(), "b": func.adamw(0.1)}, lambda n, p: n[0]),
    ],
)
def test_vmapped_and_compiled_chains_equal_eager_ones(make):
    optimizer = make()
    grads = [draw(i + 1) for i in range(4)]
    grads[1]["a.bias"][0] = (
        float("nan") if "skip_nonfinite" in dict(optimizer.init(draw(0)).items()) else 0.0
    )
    expected, state, _ = walk(optimizer, 4, grads=grads)

    def one(params, grad, state):
        updates, new = optimizer.update(
            TensorDict(grad), func.tensordicts.to_tensordict(state), TensorDict(params)
        )
        return func.tensordicts.to_dict(
            func.apply_updates(TensorDict(params), updates)
        ), func.tensordicts.to_dict(new)

    batched = lambda *args: torch.vmap(one)(*args)  # noqa: E731
    for run, extra in (
        (batched, True),
        (torch.compile(one, backend="eager", fullgraph=True), False),
    ):
        lift = (lambda t: torch.stack([t, t])) if extra else (lambda t: t)
        params, states = (
            _map(lift, dict(draw(0).items())),
            _map(lift, func.tensordicts.to_dict(optimizer.init(draw(0)))),
        )
        for grad in grads:
            params, states = run(params, _map(lift, dict(grad.items())), states)
        for name, value in expected.items():
            got = params[name][1] if extra else params[name]
            assert torch.allclose(got, value, atol=1e-6), name
        for name, value in func.tensordicts.named_leaves(state).items():
            got = func.tensordicts.named_leaves(states)[name]
            assert torch.allclose(got[1] if extra else got, value, atol=1e-6), name


def _map(fn, tree):
    return (
        fn(tree)
        if isinstance(tree, torch.Tensor)
        else {name: _map(fn, value) for name, value in tree.items()}
    )


LR = torch.optim.lr_scheduler
SCHEDULES = {
    "linear": (func.linear(2.0, 1.0, 8), lambda o: LR.LinearLR(o, 1.0, 0.5, 8), 2.0),
    "exponential": (func.exponential(0.9), lambda o: LR.ExponentialLR(o, 0.9), 1.0),
    "cosine": (func.cosine(20, end=0.1), lambda o: LR.CosineAnnealingLR(o, 20, 0.1), 1.0),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_equal_pytorch(name):
    schedule, make_scheduler, base = SCHEDULES[name]
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=base)
    scheduler = make_scheduler(optimizer)
    for count in range(20):
        assert schedule(count) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12)
        assert float(schedule(torch.tensor(count))) == pytest.approx(schedule(count), abs=1e-6)
        optimizer.step()
        scheduler.step()


def test_joined_schedules_and_a_warm_up_above_zero():
    combined = func.join_schedules([func.linear(0.0, 1.0, 4), func.exponential(0.5)], [4])
    assert [combined(n) for n in (0, 2, 4, 5, 6)] == [0.0, 0.5, 1.0, 0.5, 0.25]
    assert [float(combined(torch.tensor(n))) for n in (0, 2, 4, 5, 6)] == [0.0, 0.5, 1.0, 0.5, 0.25]
    warm = func.cosine(12, warmup=4)
    assert [warm(n) for n in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert [float(warm(torch.tensor(n))) for n in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize(
    "make",
    [
        lambda: func.chain(
            func.masked(func.scale_by_schedule(lambda n: 0.0), ("a.*",)), func.sgd(0.1)
        ),
        lambda: func.masked(func.chain(func.clip_by_value(1.0), func.accumulate(2)), ("a.*",)),
        lambda: func.partition(
            {"a": func.skip_nonfinite(), "b": func.skip_nonfinite()}, lambda n, p: n[0]
        ),
        lambda: func.partition(
            {"a": func.sgd(0.1), "b": func.clip_by_value(1.0)}, lambda n, p: n[0]
        ),
        lambda: func.chain(func.sgd(0.1), func.chain(func.clip_by_global_norm(0.1))),
        lambda: func.chain(
            func.sgd(0.1), func.partition({"a": func.clip_by_value(1.0)}, lambda n, p: "a")
        ),
        lambda: func.chain(torch.optim.SGD([torch.zeros(1)])),
        lambda: func.chain(func.sgd),
    ],
)
def test_invalid_combinations_raise(make):
    with pytest.raises(OptimizerError):
        make()


@pytest.mark.parametrize(
    "inner", [func.adamw, func.muon, lambda: func.chain(func.skip_nonfinite(), func.sgd(0.1))]
)
def test_a_label_without_parameters_changes_nothing(inner):
    optimizer = func.partition({"all": func.sgd(0.1), "none": inner()}, lambda n, p: "all")
    equal(walk(optimizer)[0], walk(func.sgd(0.1))[0])


def test_ema_params_merges_the_labels_of_a_partition():
    averaged = func.chain(func.sgd(0.1), func.ema(0.5))
    _, state, _ = walk(func.partition({"a": averaged, "b": averaged}, lambda n, p: n[0]))
    _, expected, _ = walk(averaged)
    equal(func.ema_params(state), func.ema_params(expected))


def test_a_partition_of_averages_after_the_optimizer_equals_one_average():
    labels = func.partition({"a": func.ema(0.5), "b": func.ema(0.5)}, lambda n, p: n[0])
    _, state, _ = walk(func.chain(func.sgd(0.1), labels))
    _, expected, _ = walk(func.chain(func.sgd(0.1), func.ema(0.5)))
    equal(func.ema_params(state), func.ema_params(expected))
    with pytest.raises(OptimizerError, match="after an optimizer"):
        func.chain(labels, func.sgd(0.1))


def test_ema_does_not_move_after_a_skipped_update():
    inner = func.masked(func.chain(func.accumulate(2), func.sgd(0.1)), ("a.*",))
    _, state, _ = walk(func.chain(inner, func.ema(0.5)), 1)
    equal(func.ema_params(state), draw(0))


def test_an_update_does_not_write_into_gradients():
    optimizer, grads = func.sgd(0.1, momentum=0.9, nesterov=True, foreach=True), draw(1)
    before = grads.clone()
    optimizer.update(grads, optimizer.init(draw(0)), draw(0))
    equal(grads, before)


@pytest.mark.parametrize(
    "wrong", [func.accumulate(2), func.ema(0.5), func.skip_nonfinite(), func.adafactor()]
)
def test_a_state_of_another_transformation_raises(wrong):
    with pytest.raises(OptimizerError, match="not the state of"):
        wrong.update(draw(1), func.sgd(0.1, momentum=0.9).init(draw(0)), draw(0))
