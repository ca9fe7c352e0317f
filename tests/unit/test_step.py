"""`scaled_backward` and `optimizer_step` on one process: clipping, loss scale and errors."""

import gc
import itertools
import weakref

import attrs
import numpy as np
import pytest
import torch
from torch import nn

import faccel
from faccel.errors import ConfigError, FaccelError, ModelError, OptimizerError, ScalerError
from faccel.testing import fake_context

ONE = fake_context(0, 1)
HALF = fake_context(0, 1, config={"mixed_precision": "fp16"})


def net():
    torch.manual_seed(0)
    return nn.Linear(3, 1)


def step_once(ctx, scaler, model, opt, factor=1.0, **options):
    scaler = faccel.scaled_backward(model(torch.ones(2, 3)).sum() * factor, scaler, ctx)
    return faccel.optimizer_step(opt, scaler, ctx, **options)


def test_clipping_by_norm_equals_torch_and_reports_the_norm_before_clipping():
    model, reference = net(), net()
    opts = [torch.optim.SGD(m.parameters(), lr=1.0) for m in (model, reference)]
    info, _ = step_once(ONE, faccel.init_scaler(ONE), model, opts[0], 50.0, clip_norm=0.5)
    (reference(torch.ones(2, 3)).sum() * 50.0).backward()
    norm = nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
    opts[1].step()
    assert torch.equal(info.grad_norm, norm)
    assert info.grad_norm.ndim == 0
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), reference.parameters(), strict=True)
    )


def test_clipping_by_value_is_after_unscaling():
    model = net()
    before = model.weight.detach().clone()
    opt = torch.optim.SGD(model.parameters(), lr=1.0)
    info, _ = step_once(HALF, faccel.init_scaler(HALF), model, opt, clip_value=0.25)
    assert not info.skipped
    assert torch.allclose(before - model.weight, torch.full((1, 3), 0.25))


def test_a_step_sets_only_the_gradients_of_its_optimizer_to_none():
    a, b = net(), net()
    opt = torch.optim.SGD(a.parameters(), lr=1.0)
    scaler = faccel.scaled_backward(
        (a(torch.ones(1, 3)) + b(torch.ones(1, 3))).sum(), faccel.init_scaler(ONE), ONE
    )
    info, _ = faccel.optimizer_step(opt, scaler, ONE)
    assert info.grad_norm is None
    assert all(p.grad is None for p in a.parameters())
    assert all(p.grad is not None for p in b.parameters())


def test_schedulers_move_once_per_update_and_not_on_a_skipped_one():
    model = net()
    opt = torch.optim.SGD(model.parameters(), lr=1.0)
    first = torch.optim.lr_scheduler.StepLR(opt, step_size=2)
    second = torch.optim.lr_scheduler.LambdaLR(opt, lambda n: 1.0)
    scaler = faccel.init_scaler(HALF)
    for factor in (1.0, float("nan"), 1.0):
        info, scaler = step_once(HALF, scaler, model, opt, factor, scheduler=[first, second])
        assert info.skipped == (factor != 1.0)
    assert (first.last_epoch, second.last_epoch) == (2, 2)
    with pytest.raises(ConfigError, match="plateau"):
        step_once(
            HALF, scaler, model, opt, scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau(opt)
        )


def test_an_update_that_is_not_finite_is_applied_without_skip_nonfinite():
    for skip in (False, True):
        model = net()
        opt = torch.optim.SGD(model.parameters(), lr=1.0)
        info, scaler = step_once(
            ONE, faccel.init_scaler(ONE), model, opt, float("nan"), skip_nonfinite=skip
        )
        assert info.skipped == skip
        assert model.weight.isfinite().all() == skip
        assert scaler.num_skipped == int(skip)


@pytest.mark.parametrize("pattern", list(itertools.product([True, False], repeat=5)))
def test_the_loss_scale_equals_that_of_torchs_grad_scaler(pattern):
    options = {"growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2}
    torchs = torch.amp.GradScaler("cpu", init_scale=64.0, **options)
    scaler = faccel.init_scaler(HALF, scale=64.0, **options)
    model, reference = net(), net()
    opts = [torch.optim.SGD(m.parameters(), lr=0.01) for m in (model, reference)]
    for finite in pattern:
        factor = 1.0 if finite else float("inf")
        assert scaler.scale == torchs.get_scale()
        info, scaler = step_once(HALF, scaler, model, opts[0], factor)
        torchs.scale(reference(torch.ones(2, 3)).sum() * factor).backward()
        torchs.step(opts[1])
        torchs.update()
        opts[1].zero_grad()
        assert info.skipped != finite
        assert torch.equal(model.weight, reference.weight)
    assert scaler.scale == torchs.get_scale()
    assert scaler.num_skipped == pattern.count(False)


@pytest.mark.parametrize("finite", [True, False])
def test_two_optimizers_can_use_one_scaler(finite):
    a, b = net(), net()
    opts = [torch.optim.SGD(m.parameters(), lr=1.0) for m in (a, b)]
    scaler = faccel.init_scaler(HALF, scale=4.0, growth_interval=1)
    x = torch.ones(1, 3)
    loss = a(x).sum() * (1.0 if finite else float("inf")) + b(x).sum()
    scaler = faccel.scaled_backward(loss, scaler, HALF)
    before = b.weight.detach().clone()
    infos = []
    for opt in opts:
        info, scaler = faccel.optimizer_step(opt, scaler, HALF)
        infos.append(info)
    assert [i.scale for i in infos] == [
        4.0,
        4.0,
    ]  # the second is unscaled by what its gradients were scaled by
    assert torch.allclose(before - b.weight, torch.ones(1, 3))
    assert scaler.scale == (8.0 if finite else 2.0)


def test_the_scale_does_not_change_inside_a_window():
    model = net()
    opt = torch.optim.SGD(model.parameters(), lr=1.0)
    scaler = faccel.init_scaler(HALF, scale=8.0, growth_interval=1)
    before = model.weight.detach().clone()
    for _ in range(3):
        scaler = faccel.scaled_backward(
            model(torch.ones(1, 3)).sum(), scaler, HALF, scale=torch.tensor(0.5)
        )
    info, scaler = faccel.optimizer_step(opt, scaler, HALF)
    assert torch.allclose(before - model.weight, torch.full((1, 3), 1.5))
    assert (info.scale, scaler.scale) == (8.0, 16.0)


def test_a_scaler_is_a_value():
    scaler = faccel.init_scaler(HALF)
    assert scaler == faccel.init_scaler(HALF)
    assert hash(scaler) == hash(faccel.init_scaler(HALF))
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        scaler.scale = 1.0


@pytest.mark.parametrize("ctx", [ONE, HALF])
def test_a_scaler_from_before_the_backward_is_an_error(ctx):
    model = net()
    opt = torch.optim.SGD(model.parameters(), lr=1.0)
    model(torch.ones(1, 3)).sum().backward()
    with pytest.raises(ScalerError, match=r"scaler = faccel\.scaled_backward"):
        faccel.optimizer_step(opt, faccel.init_scaler(ctx), ctx)


def test_a_step_without_gradients_is_an_error():
    opt = torch.optim.SGD(net().parameters(), lr=1.0)
    with pytest.raises(OptimizerError, match="2 parameters"):
        faccel.optimizer_step(opt, faccel.init_scaler(ONE), ONE)


def test_a_loss_that_cannot_be_differentiated_is_an_error():
    w = torch.ones(2, requires_grad=True)
    for loss in (w * 2, torch.ones(())):
        with pytest.raises(ModelError, match="scalar"):
            faccel.scaled_backward(loss, faccel.init_scaler(ONE), ONE)


def test_a_limit_may_be_a_number_of_numpy():
    model = net()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = faccel.init_scaler(ONE)
    step_once(ONE, scaler, model, opt, 50.0, clip_norm=np.float32(0.5))
    step_once(ONE, scaler, model, opt, 50.0, clip_value=np.int64(1))


@pytest.mark.parametrize(
    "options", [{"clip_norm": 0.0}, {"clip_value": -1.0}, {"clip_norm": float("nan")}]
)
def test_a_limit_that_is_not_positive_is_an_error(options):
    model = net()
    with pytest.raises(ConfigError):
        step_once(
            ONE,
            faccel.init_scaler(ONE),
            model,
            torch.optim.SGD(model.parameters(), lr=1.0),
            **options,
        )


def test_an_error_leaves_the_gradients_as_they_were():
    model = net()
    opt = torch.optim.SGD(model.parameters(), lr=1.0)
    scaler = faccel.scaled_backward(model(torch.ones(2, 3)).sum(), faccel.init_scaler(HALF), HALF)
    before = [p.grad.clone() for p in model.parameters()]
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(opt)
    for options in ({"clip_norm": 0.0}, {"scheduler": plateau, "clip_norm": 0.1}):
        with pytest.raises(ConfigError):
            faccel.optimizer_step(opt, scaler, HALF, **options)
        assert all(torch.equal(a, p.grad) for a, p in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("ctx", [ONE, HALF])
def test_sparse_and_mixed_gradients_are_inspected(ctx):
    table, other = nn.Embedding(4, 2, sparse=True), nn.Linear(2, 1).double()
    opt = torch.optim.SGD([*table.parameters(), *other.parameters()], lr=1.0)
    for bad in (False, True):
        loss = other(table(torch.tensor([1, 1])).double()).sum() * (float("inf") if bad else 1.0)
        scaler = faccel.scaled_backward(loss, faccel.init_scaler(ctx), ctx)
        info, _ = faccel.optimizer_step(opt, scaler, ctx, skip_nonfinite=True)
        assert info.skipped == bad
        assert table.weight.isfinite().all()


def test_scaler_options_are_checked():
    for options in ({"scael": 1.0}, {"scale": 0.0}, {"backoff_factor": 2.0}):
        with pytest.raises(ConfigError):
            faccel.init_scaler(HALF, **options)


def test_wrap_raises_for_values_that_are_not_models():
    for bad in (nn.ReLU(), 3, faccel.wrap(net(), ONE)):
        with pytest.raises(ModelError):
            faccel.wrap(bad, ONE)
    with pytest.raises(FaccelError, match="plan"):
        faccel.wrap(net(), ONE, plan={})
    with pytest.raises(ModelError, match="generate"):
        faccel.wrap(net(), ONE).call("generate")


def test_a_module_that_is_not_wrapped_is_an_error():
    module = net()
    opt = torch.optim.SGD(module.parameters(), lr=1.0)
    for call in (
        lambda: faccel.unwrap(module),
        lambda: faccel.grad_sync(module, on=True),
        lambda: faccel.wrap_optimizer(opt, module, ONE),
    ):
        with pytest.raises(ModelError, match="wrap"):
            call()


def test_attributes_of_a_wrapped_model_are_those_of_the_module():
    module = net()
    model = faccel.wrap(module, ONE)
    assert faccel.unwrap(model) is module
    assert list(model.state_dict()) == ["weight", "bias"]
    assert [n for n, _ in model.named_parameters()] == ["weight", "bias"]
    assert model.in_features == 3
    assert model.eval() is model
    assert not module.training
    with pytest.raises(AttributeError, match="nothing"):
        _ = model.nothing


def test_without_device_placement_the_model_stays_where_it_is():
    ctx = attrs.evolve(
        fake_context(0, 1, config={"device_placement": False}), device=torch.device("meta")
    )
    assert faccel.wrap(net(), ctx).weight.device.type == "cpu"


class SignDescent(torch.optim.Optimizer):
    """An optimizer of a user, written without faccel."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p -= group["lr"] * p.grad.sign()


@pytest.mark.parametrize("ctx", [ONE, HALF], ids=["fp32", "fp16"])
def test_any_optimizer_steps_and_one_that_needs_a_closure_raises(ctx):
    for make in (
        lambda params: SignDescent(params, lr=0.5),
        lambda params: torch.optim.SGD(params, lr=0.5, foreach=False),
        lambda params: torch.optim.LBFGS(params, lr=0.5),
    ):
        model = faccel.wrap(nn.Linear(2, 1, bias=False), ctx)
        before = model.weight.detach().clone()
        opt = faccel.wrap_optimizer(make(model.parameters()), model, ctx)
        scaler = faccel.scaled_backward(
            model(torch.ones(1, 2)).sum(), faccel.init_scaler(ctx, scale=8.0), ctx
        )
        if isinstance(opt, torch.optim.LBFGS):
            with pytest.raises(OptimizerError, match="closure"):
                faccel.optimizer_step(opt, scaler, ctx)
        else:
            faccel.optimizer_step(opt, scaler, ctx)
            assert torch.allclose(model.weight, before - 0.5)


def test_another_context_than_the_models_is_an_error():
    other = fake_context(0, 1, config={"mixed_precision": "fp16"})
    model = faccel.wrap(net(), ONE)
    opt = torch.optim.SGD(model.parameters(), lr=1.0)
    with pytest.raises(ModelError, match="`ctx` is not the context that `model` was wrapped with"):
        faccel.wrap_optimizer(opt, model, other)
    opt = faccel.wrap_optimizer(opt, model, ONE)
    scaler = faccel.scaled_backward(model(torch.ones(2, 3)).sum(), faccel.init_scaler(ONE), ONE)
    with pytest.raises(OptimizerError, match="`ctx` is not the context") as caught:
        faccel.optimizer_step(opt, scaler, other)
    assert "faccel.wrap_optimizer" in caught.value.fix
    assert model.weight.grad is not None
    same_world = attrs.evolve(ONE, device=torch.device("cpu"))
    info, _ = faccel.optimizer_step(opt, scaler, same_world)
    assert not info.skipped


def test_the_record_of_an_optimizer_does_not_keep_it_alive():
    model = faccel.wrap(net(), ONE)
    opt = faccel.wrap_optimizer(torch.optim.SGD(model.parameters(), lr=1.0), model, ONE)
    assert not [name for name in vars(opt) if "faccel" in name]
    alive = weakref.ref(opt)
    del opt
    gc.collect()
    assert alive() is None
