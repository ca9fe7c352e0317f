"""Errors of `faccel.func`: each names the leaf, the argument and a fix."""

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch import nn

from faccel import func
from faccel.errors import (
    ConfigError,
    DataError,
    DesyncError,
    DonatedError,
    ModelError,
    OptimizerError,
    PurityError,
    TreeError,
)
from faccel.func.gradient_transformation import Updates
from faccel.func.rng_streams import NoGenerator
from faccel.testing import fake_context, simulate
from tests.functional import batch_of, loss_of, net

CTX = fake_context(0, 1)


def params(**shapes):
    return TensorDict({name: torch.ones(shape) for name, shape in (shapes or {"w": (2,)}).items()})


@pytest.mark.parametrize(
    ("grads", "message"),
    [
        ({"v": torch.ones(2)}, "only in the"),
        ({"w": torch.ones(3)}, "`w`: float32[3] in the gradients, float32[2] in the parameters"),
        ({"w": torch.ones(2, dtype=torch.float64)}, "`w`: float64[2] in the gradients"),
    ],
)
@pytest.mark.parametrize(
    "optimizer", [func.sgd(0.1), func.chain(func.clip_by_global_norm(1.0), func.adamw(1e-3))]
)
def test_gradients_with_other_names_shapes_or_dtypes_raise(optimizer, grads, message):
    with pytest.raises(TreeError) as caught:
        optimizer.update(TensorDict(grads), optimizer.init(params()), params())
    assert message in caught.value.got


def test_an_optimizer_state_of_another_model_raises():
    optimizer = func.adamw(1e-3)
    state = optimizer.init(params(w=(3,)))
    with pytest.raises(TreeError) as caught:
        optimizer.update(params(), state, params())
    assert "`w`: float32[3] in the `exp_avg` of adamw" in caught.value.got


def test_rollback_raises_for_what_is_neither_a_state_nor_a_history():
    run = func.rollback(func.make_step(loss_of(net()), func.sgd(0.1), CTX))
    with pytest.raises(ModelError, match="TrainState"):
        run({}, batch_of(0, CTX))


def test_an_optimizer_state_of_another_transformation_raises():
    model = net()
    state = func.init_state(model, func.sgd(0.1), CTX, seed=0)
    with pytest.raises(OptimizerError, match="`adamw`") as caught:
        func.make_step(loss_of(model), func.adamw(1e-3), CTX)(state, batch_of(0, CTX))
    assert "exp_avg" in caught.value.got


@pytest.mark.parametrize(
    ("loss_fn", "error", "got"),
    [
        (lambda p, b, g: p["w"], ModelError, "a float32 tensor of shape (2,)"),
        (lambda p, b, g: p["w"].sum().item(), ModelError, "a float"),
        (lambda p, b, g: (p["w"].sum(), 1), ModelError, "a tuple of 2"),
        (lambda p, b, g: p["w"].detach().sum(), ModelError, "a float32 tensor of shape ()"),
        (lambda p, b, g: p["w"].sum().long(), ModelError, "a int64 tensor of shape ()"),
        (lambda p, b, g: (p["w"] * torch.rand(2)).sum(), PurityError, "draws"),
        (lambda p, b, g: p["w"].sum() * float(np.random.rand()), PurityError, "draws"),
        (lambda p, b, g: (p["w"] * b[0].mul_(2)).sum(), PurityError, "another value of `batch[0]`"),
        (
            lambda p, b, g: (p["w"].data.add_(1) * 0 + p["w"]).sum(),
            PurityError,
            "another value of `params['w']`",
        ),
        (
            lambda p, b, g: p["w"].sum() + float(b[1]["n"].__iadd__(1)[0]),
            PurityError,
            "`batch[1]['n']`",
        ),
    ],
)
def test_an_invalid_or_impure_loss_function_raises(loss_fn, error, got):
    optimizer = func.sgd(0.1)
    state = func.init_state(_Vector(), optimizer, CTX, seed=0)
    with pytest.raises(error) as caught:
        func.make_step(loss_fn, optimizer, CTX)(state, (torch.ones(2), {"n": np.ones(2)}))
    assert got in caught.value.got


class _Vector(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(2))


def test_a_missing_aux_output_raises():
    state = func.init_state(_Vector(), func.sgd(0.1), CTX, seed=0)
    step = func.make_step(lambda p, b, g: p["w"].sum(), func.sgd(0.1), CTX, has_aux=True)
    with pytest.raises(ModelError, match=r"must return `\(loss, aux\)`"):
        step(state, None)


def test_writes_are_detected_at_every_step_in_debug_mode():
    calls = []

    def loss_fn(p, b, g):
        calls.append(None)
        if len(calls) == 3:
            b.add_(1)
        return (p["w"] * b).sum()

    for debug, raises in ((False, False), (True, True)):
        calls.clear()
        ctx = fake_context(0, 1, config={"debug": debug})
        state = func.init_state(_Vector(), func.sgd(0.1), ctx, seed=0)
        step = func.make_step(loss_fn, func.sgd(0.1), ctx)
        has_raised = False
        try:
            for _ in range(4):
                _, state = step(state, torch.ones(2))
        except PurityError:
            has_raised = True
        assert has_raised == raises


def test_a_write_to_buffers_that_were_not_passed_raises_and_leaves_the_model_unchanged():
    model = net(norm=True)
    before = model.norm.running_mean.clone()
    state = func.init_state(model, func.sgd(0.1), CTX, seed=0)
    with pytest.raises(PurityError) as caught:
        func.make_step(loss_of(model), func.sgd(0.1), CTX)(state, batch_of(0, CTX))
    assert caught.value.got == "`norm.num_batches_tracked`, `norm.running_mean`, `norm.running_var`"
    assert torch.equal(model.norm.running_mean, before)


def test_dropout_without_a_generator_raises():
    model = net(dropout=0.5)
    state = func.init_state(model, func.sgd(0.1), CTX, seed=0)

    def loss_fn(params, batch, generator):
        return func.functional_call(model, params, batch[0]).mean()

    before = torch.get_rng_state()
    with pytest.raises(PurityError, match="drew random numbers"):
        func.make_step(loss_fn, func.sgd(0.1), CTX)(state, batch_of(0, CTX))
    assert torch.equal(before, torch.get_rng_state())


def donated():
    model, optimizer = net(), func.adamw(1e-2)
    old = func.init_state(model, optimizer, CTX, seed=0)
    step = func.make_step(loss_of(model), optimizer, CTX, donate=True)
    address = old.params["out.bias"].data_ptr()
    _, new = step(old, batch_of(0, CTX))
    assert new.params["out.bias"].data_ptr() == address
    return model, step, old, new


@pytest.mark.parametrize(
    "use",
    [
        lambda model, step, state: step(state, batch_of(1, CTX)),
        lambda model, step, state: state.params["out.bias"],
        lambda model, step, state: list(state.opt.keys()),
        lambda model, step, state: dict(state.params.items()),
        lambda model, step, state: func.merge(model, state),
        lambda model, step, state: func.stack([state]),
    ],
)
def test_every_use_of_a_donated_state_raises(use):
    model, step, old, new = donated()
    with pytest.raises(DonatedError) as caught:
        use(model, step, old)
    assert "metrics, state = step(state, batch)" in caught.value.fix
    assert "<donated>" in repr(old)
    use(model, step, new)


@pytest.mark.parametrize(
    ("make", "got"),
    [
        (
            lambda: func.chain(func.adamw(1e-3), func.clip_by_global_norm(1.0)),
            "`clip_by_global_norm` after `adamw`",
        ),
        (lambda: func.chain(func.sgd(0.1), func.adamw(1e-3)), "`adamw` after `sgd`"),
        (lambda: func.chain(func.ema(0.9), func.adamw(1e-3)), "`ema` before any optimizer"),
        (
            lambda: func.make_step(loss_of(net()), func.clip_by_global_norm(1.0), CTX),
            "`clip_by_global_norm`",
        ),
        (lambda: func.ema_params(func.sgd(0.1).init(params())), "no `ema`"),
        (lambda: func.muon(0.1).init(params(w=(2, 2, 2))), "shape (2, 2, 2)"),
    ],
)
def test_an_invalid_order_of_a_chain_raises(make, got):
    with pytest.raises(OptimizerError) as caught:
        make()
    assert got in caught.value.got


@pytest.mark.parametrize(
    ("make", "fix"),
    [
        (
            lambda: func.partition({"body": func.sgd(0.1)}, lambda n, p: "boddy").init(params()),
            "use `body`",
        ),
        (lambda: func.masked(func.sgd(0.1), ("v*",)).init(params()), "use one of `w`"),
        (lambda: func.masked(func.sgd(0.1), {"v": True}).init(params()), "name every parameter"),
        (lambda: func.clip_by_global_norm(0.0), "max_norm=1.0"),
        (lambda: func.accumulate(0), "num_steps=1` or more"),
        (lambda: func.ema(1.5), "decay=1"),
        (lambda: func.adamw(-1.0), "adamw(1e-3)"),
        (lambda: func.adam(1e-3, betas=(1.0, 0.9)), "leave it out"),
        (lambda: func.sgd(0.1, nesterov=True), "momentum=0.9"),
        (lambda: func.muon(0.1, adjust_lr_fn="originl"), "use `original`"),
        (lambda: func.scale_by_schedule(0.5), "lambda count"),
        (lambda: func.cosine(10, warmup=10), "num_updates=11` or more"),
        (lambda: func.join_schedules([func.linear(0, 1, 2)], [3]), "join_schedules("),
        (
            lambda: func.make_step(loss_of(net()), func.sgd(0.1), CTX, num_micro_batches=0),
            "num_micro_batches=1",
        ),
        (lambda: func.sam(loss_of(net()), func.sgd(0.1), CTX, rho=0.0), "rho=1.0"),
        (lambda: func.adapt(loss_of(net()), func.sgd(0.1), num_steps=0), "num_steps=1` or more"),
        (lambda: func.rollback(lambda s, b: (s, b), keep=0), "keep=1` or more"),
    ],
)
def test_invalid_values_raise_with_a_fix(make, fix):
    with pytest.raises(ConfigError) as caught:
        make()
    assert fix in caught.value.fix


def test_models_without_values_or_parameters_raise():
    with pytest.raises(ModelError, match="materialize"):
        func.init_state(nn.Linear(2, 2, device="meta"), func.sgd(0.1), CTX, seed=0)
    with pytest.raises(ModelError, match="no parameter that requires a gradient"):
        func.init_state(nn.ReLU(), func.sgd(0.1), CTX, seed=0)
    with pytest.raises(ModelError, match="TrainState"):
        func.make_step(loss_of(net()), func.sgd(0.1), CTX)(net(), batch_of(0, CTX))
    with pytest.raises(ModelError, match="no parameter or buffer of this name"):
        func.functional_call(nn.Linear(2, 2), params(w=(2,)), torch.ones(2))


def test_stacking_states_of_several_models_names_the_leaf():
    states = [func.init_state(nn.Linear(2, n), func.sgd(0.1), CTX, seed=0) for n in (1, 2)]
    with pytest.raises(ModelError, match="weight"):
        func.stack(states)
    step = func.make_step(loss_of(net()), func.sgd(0.1), CTX)
    with pytest.raises(ConfigError, match="stack"):
        func.ensemble(step, CTX)(
            func.init_state(net(), func.sgd(0.1), CTX, seed=0), batch_of(0, CTX)
        )


def test_an_error_leaves_the_state_usable():
    model = net()
    state = func.init_state(model, func.sgd(0.1), CTX, seed=0)
    step = func.make_step(loss_of(model), func.sgd(0.1), CTX, donate=True)
    with pytest.raises(RuntimeError):
        step(state, (torch.ones(2, 5, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)))
    assert int(step(state, batch_of(0, CTX))[1].step) == 1


def test_update_accepts_gradients_and_updates():
    optimizer = func.sgd(0.1)
    updates, _ = optimizer.update(params(), optimizer.init(params()), params())
    assert isinstance(updates, Updates)
    clip = func.clip_by_global_norm(1.0)
    only, _ = clip.update(params(), clip.init(params()), params())
    assert func.apply_updates(params(), only)["w"].tolist() == [1, 1]


class _Counting(nn.Module):
    """Counts its calls in a buffer, in place or by a new tensor."""

    def __init__(self, write):
        super().__init__()
        self.w = nn.Parameter(torch.ones(()))
        self.register_buffer("n", torch.zeros(()))
        self.write = write

    def forward(self, x):
        if self.write == "in place":
            self.n += 1
        else:
            self.n = self.n + 1
        return self.w * x


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("write", ["in place", "replace"])
def test_written_or_replaced_buffers_are_returned_or_raise(write, training):
    model = _Counting(write).train(training)
    state = func.init_state(model, func.sgd(0.1), CTX, seed=0)
    for run in (
        lambda *args: func.functional_call(model, *args, buffers=state.buffers),
        torch.compile(
            lambda *args: func.functional_call(model, *args, buffers=state.buffers),
            backend="eager",
            fullgraph=True,
        ),
    ):
        _, buffers = run(state.params, torch.ones(()))
        assert (buffers["n"], state.buffers["n"], model.n) == (1, 0, 0)
    with pytest.raises(PurityError, match="`n`"):
        func.functional_call(model, state.params, torch.ones(()))
    assert model.n == (0 if training or write == "replace" else 1)


@pytest.mark.parametrize("write", [lambda b: b.pop("x"), lambda b: b.update(z=torch.ones(1))])
def test_adding_or_removing_a_leaf_of_a_batch_is_a_write(write):
    def loss_fn(p, b, g):
        loss = (p["w"] * b["x"]).sum()
        write(b)
        return loss

    state = func.init_state(_Vector(), func.sgd(0.1), CTX, seed=0)
    with pytest.raises(PurityError, match="batch"):
        func.make_step(loss_fn, func.sgd(0.1), CTX)(state, {"x": torch.ones(2)})


class _BatchAsGradient(torch.autograd.Function):
    """The product with a batch, whose gradient is the batch itself."""

    @staticmethod
    def forward(ctx, w, x):
        ctx.x = x
        return (w * x).sum()

    @staticmethod
    def backward(ctx, g):
        return ctx.x.view(ctx.x.shape), None


@pytest.mark.parametrize("num_micro_batches", [1, 2])
def test_a_gradient_that_aliases_the_batch_is_copied(num_micro_batches):
    optimizer = func.chain(func.clip_by_global_norm(0.1), func.sgd(0.1))
    state, batch = (
        func.init_state(_Vector(), optimizer, CTX, seed=0),
        torch.ones(num_micro_batches, 2),
    )
    step = func.make_step(
        lambda p, b, g: _BatchAsGradient.apply(p["w"], b[0]),
        optimizer,
        CTX,
        donate=True,
        num_micro_batches=num_micro_batches,
    )
    for _ in range(3):
        _, state = step(state, batch)
    assert batch.tolist() == [[1, 1]] * num_micro_batches


def test_metrics_of_a_donating_step_do_not_alias_parameters():
    state = func.init_state(_Vector(), func.sgd(0.5), CTX, seed=0)
    step = func.make_step(
        lambda p, b, g: (p["w"].sum(), p["w"]), func.sgd(0.5), CTX, donate=True, has_aux=True
    )
    metrics, _ = step(state, None)
    assert metrics["aux"].tolist() == [1, 1]


def test_a_donating_step_cannot_be_vmapped():
    step = func.make_step(loss_of(net()), func.sgd(0.1), CTX, donate=True)
    states = func.stack([func.init_state(net(), func.sgd(0.1), CTX, seed=0)] * 2)
    before = states.params["out.bias"].clone()
    with pytest.raises(ConfigError, match="donate=False"):
        func.ensemble(step, CTX)(states, batch_of(0, CTX))
    assert torch.equal(states.params["out.bias"], before)
    with pytest.raises(ConfigError, match="ensemble"):
        step(states, batch_of(0, CTX))


@pytest.mark.parametrize("weight", [None, torch.ones(2), "8"])
def test_a_weight_that_is_not_a_number_raises(weight):
    state = func.init_state(_Vector(), func.sgd(0.1), CTX, seed=0)
    step = func.make_step(lambda p, b, g: p["w"].sum(), func.sgd(0.1), CTX, weight=lambda b: weight)
    with pytest.raises(DataError, match="0-d tensor"):
        step(state, None)


def test_sparse_gradients_raise():
    model = nn.Embedding(4, 2, sparse=True)
    state = func.init_state(model, func.sgd(0.1), CTX, seed=0)
    step = func.make_step(
        lambda p, b, g: func.functional_call(model, p, b).sum(), func.sgd(0.1), CTX
    )
    with pytest.raises(ModelError, match="sparse=True"):
        step(state, torch.tensor([1, 2]))


def test_constants_that_differ_between_ranks_raise():
    def make(ctx):
        model = net()
        model.first.requires_grad_(False)
        model.first.bias.data.fill_(ctx.rank)
        func.init_state(model, func.sgd(0.1), ctx, seed=0)

    with pytest.raises(DesyncError) as caught:
        simulate(make, 2)
    assert caught.value.got == "`first.bias`"


@pytest.mark.parametrize(
    "layer", [nn.MultiheadAttention(6, 1, dropout=0.5), nn.LSTM(6, 6, 2, dropout=0.5)]
)
def test_random_layers_raise_without_a_generator(layer):
    with pytest.raises(PurityError, match="training mode"):
        NoGenerator().check_model(nn.Sequential(layer))
