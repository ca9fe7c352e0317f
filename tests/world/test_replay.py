"""`func.replay`: a step that computes two results from one state raises, and names the leaf."""

import pytest
import torch

from faccel import func
from faccel.errors import DesyncError, DonatedError, ModelError, PurityError
from faccel.testing import fake_context, simulate
from tests.functional import batch_of, loss_of, net
from tests.ranks import run_ranks
from tests.world.test_func import close

CTX = fake_context(0, 1)


def tensors_of(state):
    return func.tensordicts.named_leaves(func.train_state.state_to_dict(state))


STEPS = {
    "plain": lambda model, ctx: func.make_step(loss_of(model), func.adamw(0.1), ctx),
    "donate": lambda model, ctx: func.make_step(loss_of(model), func.adamw(0.1), ctx, donate=True),
    "sam": lambda model, ctx: func.sam(loss_of(model), func.adamw(0.1), ctx),
    "compiled": lambda model, ctx: func.compiled(
        func.make_step(loss_of(model), func.adamw(0.1), ctx), ctx, backend="eager"
    ),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Dynamo
@pytest.mark.parametrize(
    "name", ["plain", "donate", "sam", pytest.param("compiled", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("world_size", [1, 2])
def test_it_returns_what_the_step_returns(name, world_size):
    def fn(ctx):
        model = net(dropout=0.5)
        step = STEPS[name](model, ctx)
        replayed = expected = func.init_state(model, func.adamw(0.1), ctx, seed=3)
        if name == "donate":
            expected = func.init_state(model, func.adamw(0.1), ctx, seed=3)
        for i in range(2):
            before = replayed
            metrics, replayed = func.replay(step, replayed, batch_of(i, ctx), ctx)
            expected_metrics, expected = step(expected, batch_of(i, ctx))
            assert torch.equal(metrics["loss"], expected_metrics["loss"])
        actual, target = tensors_of(replayed), tensors_of(expected)
        assert actual.keys() == target.keys()
        assert all(torch.equal(actual[path], target[path]) for path in target)
        if name == "donate":
            with pytest.raises(DonatedError):
                before.params["first.weight"]
        else:
            assert int(before.step) == 1

    simulate(fn, world_size)


def test_stacked_states_and_generators_are_replayed():
    model, optimizer = net(dropout=0.5), func.sgd(0.1)
    step = func.make_step(loss_of(model), optimizer, CTX)
    states = func.stack([func.init_state(model, optimizer, CTX, seed=i) for i in range(2)])
    _, after = func.replay(func.ensemble(step, CTX), states, batch_of(0, CTX), CTX)
    assert after.step.tolist() == [1, 1]
    generators = [torch.Generator().manual_seed(5) for _ in range(2)]
    state = func.init_state(model, optimizer, CTX, seed=0)
    _, replayed = func.replay(step, state, batch_of(0, CTX), CTX, generator=generators[0])
    _, expected = step(state, batch_of(0, CTX), generators[1])
    close(tensors_of(expected), tensors_of(replayed))
    assert torch.equal(generators[0].get_state(), generators[1].get_state())


def faulty_step(ctx, bad_rank, bad_call, difference=0.25, **options):
    """Return a step in which one call on one rank computes another gradient of `out.bias`."""
    model, calls = net(), []
    loss_fn = loss_of(model)

    def loss(params, batch, generator):
        calls.append(0)
        value = loss_fn(params, batch, generator)
        if ctx.rank == bad_rank and len(calls) - 1 == bad_call:
            value = value + difference * (params["out.bias"][1] - params["out.bias"][1].detach())
        return value

    state = func.init_state(model, func.sgd(1.0), ctx, seed=0)
    return func.make_step(loss, func.sgd(1.0), ctx, **options), state


def replay_faulty_step(ctx, bad_rank, bad_call, donate):
    step, state = faulty_step(ctx, bad_rank, bad_call, donate=donate)
    with pytest.raises(PurityError) as caught:
        func.replay(step, state, batch_of(0, ctx), ctx)
    return caught.value.got


@pytest.mark.parametrize("bad_call", [0, 1])
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("donate", [False, True])
def test_a_step_that_differs_names_the_leaf(world_size, bad_call, donate):
    messages = set(simulate(replay_faulty_step, world_size, world_size - 1, bad_call, donate))
    # The gradient is averaged over the ranks, so that each has the wrong value.
    (message,) = messages
    assert "`state['params']['out.bias']` on rank 0: 1 of 3 elements differ" in message
    assert f"by up to {0.25 / world_size:.3g};" in message


def test_one_bit_of_a_loss_is_enough():
    def fn(ctx):
        calls = []

        def step(state, batch):
            calls.append(0)
            loss = torch.tensor(-0.0 if len(calls) == 2 and ctx.rank == 1 else 0.0)
            return {"loss": loss}, state

        state = func.init_state(net(), func.sgd(0.1), ctx, seed=0)
        with pytest.raises(PurityError) as caught:
            func.replay(step, state, None, ctx)
        return caught.value.got

    for got in simulate(fn, 3):
        assert got == (
            "`metrics['loss']` on rank 1: 1 of 1 elements differ, by up to 0; "
            "results differ on rank 1"
        )


def test_replicas_that_differ_are_named():
    def fn(ctx):
        step, state = faulty_step(ctx, None, None)
        if ctx.rank == 1:
            state.params["first.weight"][2, 3] += 0.5
        with pytest.raises(DesyncError) as caught:
            func.replay(step, state, batch_of(0, ctx), ctx)
        return caught.value.got

    for got in simulate(fn, 4):
        # The gradient is the same on all ranks, after the all-reduce.
        assert got == (
            "`state['params']['first.weight']` on rank 1: 1 of 36 elements differ, by up to 0.5; "
            "different on rank 1 than on rank 0"
        )


def test_auxiliary_values_of_ranks_may_differ():
    def fn(ctx):
        model = net()

        def loss(params, batch, generator):
            return loss_of(model)(params, batch, generator), {"rank": torch.tensor(ctx.rank)}

        state = func.init_state(model, func.sgd(1.0), ctx, seed=0)
        step = func.make_step(loss, func.sgd(1.0), ctx, has_aux=True)
        return int(func.replay(step, state, batch_of(0, ctx), ctx)[0]["aux"]["rank"])

    assert simulate(fn, 2) == (0, 1)


def test_it_costs_two_steps_and_one_reduction():
    def run(ctx, replays):
        step, state = faulty_step(ctx, None, None)
        batch = batch_of(0, ctx)
        if replays:
            func.replay(step, state, batch, ctx)
        else:
            step(state, batch)
            step(state, batch)

    def calls(replays):
        trace = simulate(run, 2, replays).trace
        return [(event.op, event.num_bytes) for event in trace if event.rank == 1]

    assert calls(True) == [*calls(False), ("all_reduce", 24)]


def test_wrong_states_raise():
    with pytest.raises(ModelError, match="init_state"):
        func.replay(lambda state, batch: ({}, state), {"w": torch.ones(1)}, None, CTX)


def real(ctx):
    return replay_faulty_step(ctx, 1, 1, False)


@pytest.mark.slow
def test_real_ranks_name_the_leaf():
    for message in run_ranks(real, 2):
        assert "`state['params']['out.bias']` on rank 0: 1 of 3 elements differ" in message
