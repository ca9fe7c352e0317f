"""Loss spikes: statistics against NumPy, and what a loop does about a spike."""

import math

import numpy as np
import pytest
import torch

import faccel
from faccel import func
from faccel.errors import ConfigError, ModelError
from faccel.testing import assert_pure, fake_context, simulate
from tests.cases.worlds import OPTIMIZERS, WORLDS, Net, backward, build, rows, square, values
from tests.functional import batch_of, loss_of, net

CTX = fake_context(0, 1)
LOSSES = np.random.default_rng(0).normal(3.0, 0.2, 300).tolist()


def after(losses, **options):
    state = func.init_spike(**options)
    flags = []
    for loss in losses:
        is_spike, state = func.detect_spike(state, loss)
        flags.append(is_spike)
    return flags, state


def test_the_first_statistics_are_the_plain_mean_and_variance():
    flags, state = after(LOSSES[:80], decay=0.99)
    assert not any(flags)
    assert math.isclose(state.mean, np.mean(LOSSES[:80]), rel_tol=1e-12)
    assert math.isclose(state.variance, np.var(LOSSES[:80]), rel_tol=1e-12)


def test_later_statistics_are_weighted_exponentially():
    decay = 0.9
    _, state = after(LOSSES, decay=decay)
    weights = np.zeros(len(LOSSES))
    for index in range(len(LOSSES)):
        weight = max(1 - decay, 1 / (index + 1))
        weights[:index] *= 1 - weight
        weights[index] = weight
    mean = np.average(LOSSES, weights=weights)
    variance = np.average((np.array(LOSSES) - mean) ** 2, weights=weights)
    assert math.isclose(state.mean, mean, rel_tol=1e-12)
    assert math.isclose(state.variance, variance, rel_tol=1e-9)


def test_a_spike_is_above_the_threshold_and_does_not_enter_the_statistics():
    _, state = after(LOSSES, threshold=5.0)
    limit = state.mean + 5.0 * math.sqrt(state.variance)
    for loss, expected in ((limit * 0.999, False), (limit * 1.001, True), (math.nan, True),
                           (math.inf, True), (-math.inf, True), (-1e9, False)):  # fmt: skip
        is_spike, new_state = func.detect_spike(state, loss)
        assert is_spike == expected, loss
        assert (new_state.mean == state.mean) == expected
        assert new_state.num_spikes == new_state.num_consecutive == int(expected)
    # So a spike does not hide the next one.
    flags, state = after([*LOSSES, 100.0, 100.0, 100.0, 3.0])
    assert flags[-4:] == [True, True, True, False]
    assert (state.num_spikes, state.num_consecutive, state.num_losses) == (3, 0, 301)


def test_nothing_but_nan_and_infinity_is_a_spike_in_the_warmup():
    flags, state = after([1.0, 100.0, math.nan, 1.0, 1000.0], warmup=5)
    assert flags == [False, False, True, False, False]
    assert state.num_losses == 4


def test_equal_losses_have_no_spike_by_rounding():
    flags, _ = after([1.0] * 20 + [1.0 + 1e-7, 1.1], warmup=5)
    assert flags[-2:] == [False, True]
    assert after([0.0] * 9 + [1e-30], warmup=5)[0][-1]


def test_it_is_pure_and_takes_tensors():
    state = after(LOSSES)[1]
    assert_pure(func.detect_spike, state, torch.tensor(2.0))
    expected = func.detect_spike(state, 2.5)
    assert func.detect_spike(state, torch.tensor([2.5], requires_grad=True)) == expected


def test_wrong_arguments_raise():
    for options in ({"threshold": 0.0}, {"decay": 1.5}, {"warmup": 0}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            func.init_spike(**options)
    for loss in (torch.ones(2), "1.0", None):
        with pytest.raises(ModelError, match=r"loss\.mean\(\)"):
            func.detect_spike(func.init_spike(), loss)


def test_a_state_is_saved_and_continues(tmp_path):
    state = after([*LOSSES, math.nan])[1]
    faccel.save({"spikes": state}, tmp_path, CTX, step=1)
    loaded = faccel.load({"spikes": func.init_spike()}, tmp_path, CTX)["spikes"]
    assert loaded == state


@pytest.mark.parametrize("num_bad", [1, 2])
def test_rollback_skips_a_spike_and_returns_to_the_state_before(num_bad):
    model, optimizer = net(), func.sgd(0.01)
    loss_fn = loss_of(model)

    def scaled_loss(params, batch, generator):
        return batch[1] * loss_fn(params, batch[0], generator)

    step = func.make_step(scaled_loss, optimizer, CTX)
    run = func.rollback(step, keep=3, spikes=func.init_spike(warmup=3))
    history = func.init_state(model, optimizer, CTX, seed=0)
    for i in range(5):
        _, history = run(history, (batch_of(i, CTX), 1.0))
    states = history.states
    for _ in range(num_bad):
        metrics, history = run(history, (batch_of(0, CTX), 1e4))
        assert bool(metrics["skipped"])
        assert bool(metrics["loss"].isfinite())
    assert history.state is states[-num_bad]
    assert (history.num_skipped, history.spikes.num_spikes) == (num_bad, num_bad)
    assert "skipped" not in run(history, (batch_of(1, CTX), 1.0))[0]


def train(ctx, plan, folder, bad_updates, num_updates=8):
    """Skip each update with a spike; go back to the checkpoint at the third one in a row."""
    model, opt = build(ctx, plan, "momentum")
    scaler, spikes, flags = faccel.init_scaler(ctx), func.init_spike(warmup=3), []
    for update in range(num_updates):
        scaler = backward(ctx, model, scaler, update)
        # One rank measures a loss that is too high.
        loss = torch.tensor(1.0 + 0.01 * update)
        if update in bad_updates and ctx.rank == ctx.world_size - 1:
            loss = torch.tensor(1e4)
        loss = faccel.reduce(loss, ctx, op="mean", axis="world")
        is_spike, spikes = func.detect_spike(spikes, loss)
        flags.append(is_spike)
        if not is_spike:
            _, scaler = faccel.optimizer_step(opt, scaler, ctx)
            faccel.save({"model": model, "opt": opt}, folder, ctx, step=update)
            continue
        opt.zero_grad()
        if spikes.num_consecutive == 3:
            faccel.load({"model": model, "opt": opt}, folder, ctx, step=3)
    return flags, values(model)


def without(bad_updates, num_updates=8):
    """Train in plain torch, without these updates."""
    module = Net().double()
    opt = OPTIMIZERS["momentum"](module.parameters())
    for update in range(num_updates):
        if update not in bad_updates:
            opt.zero_grad()
            square(module, rows(update)).backward()
            opt.step()
    return dict(module.named_parameters())


@pytest.mark.parametrize("name", ["single", "ddp", "fsdp", "pp"])
@pytest.mark.parametrize(("bad", "lost"), [({4}, {4}), ({5, 6, 7}, {4, 5, 6, 7})])
def test_ranks_skip_or_go_back_together(name, bad, lost, tmp_path):
    where = WORLDS[name]
    expected = without(lost)
    for flags, params in simulate(train, where.size, where.plan, tmp_path, bad, mesh=where.mesh):
        assert {index for index, is_spike in enumerate(flags) if is_spike} == bad
        for param_name, value in params.items():
            torch.testing.assert_close(value, expected[param_name], rtol=0, atol=1e-9)
