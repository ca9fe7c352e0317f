"""Optimizer states that are sharded over the data ranks (ZeRO-1): simulated, and over gloo."""

import pytest
import torch
from torch import nn

import faccel
from faccel.errors import CheckpointError, OptimizerError
from faccel.testing import assert_replicated, fake_context, simulate
from tests.models import loss_of, model, tokens
from tests.ranks import run_ranks

ROWS, STEPS = 8, 5
ZERO, PLAIN = (faccel.parallel.DdpConfig(shard_optimizer=on) for on in (True, False))
OPTIMIZERS = {
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=1e-2, amsgrad=True),
    "SGD": lambda groups: torch.optim.SGD(groups, lr=1e-1, momentum=0.9, nesterov=True),
    "Adagrad": lambda groups: torch.optim.Adagrad(groups, lr=1e-2, initial_accumulator_value=0.1),
    "foreach": lambda groups: torch.optim.Adam(groups, lr=1e-2, foreach=True),
}


def groups_of(net):
    """Weight decay for matrices only. The last group has fewer elements than ranks."""
    params = dict(net.named_parameters())
    matrices = [p for name, p in params.items() if p.ndim == 2]
    vectors = [p for name, p in params.items() if p.ndim < 2 and name != "norm.bias"]
    return [
        {"params": matrices, "weight_decay": 0.1},
        {"params": vectors, "weight_decay": 0.0},
        {"params": [params["norm.bias"]], "lr": 1e-3, "weight_decay": 0.0},
    ]


def make(ctx, ddp, optimizer="AdamW"):
    net = faccel.wrap(model(), ctx, plan=faccel.Plan(ddp=ddp))
    opt = faccel.wrap_optimizer(OPTIMIZERS[optimizer](groups_of(net)), net, ctx)
    return {
        "model": net,
        "opt": opt,
        "schedule": torch.optim.lr_scheduler.StepLR(opt, 2, gamma=0.5),
    }


def run(ctx, state, steps):
    scaler, norms = faccel.init_scaler(ctx), []
    net, opt, schedule = state["model"], state["opt"], state["schedule"]
    for step in steps:
        rows = tokens(ROWS, seed=step).chunk(ctx.data_world_size)[ctx.data_rank]
        scaler = faccel.scaled_backward(loss_of(net(rows[:, :-1]), rows[:, 1:]), scaler, ctx)
        info, scaler = faccel.optimizer_step(opt, scaler, ctx, clip_norm=0.5, scheduler=schedule)
        norms.append(info.grad_norm)
    assert_replicated(dict(net.named_parameters()), ctx)
    return {name: p.detach().clone() for name, p in net.named_parameters()} | {
        "norms": torch.stack(norms)
    }


def train(ctx, ddp, optimizer="AdamW"):
    return run(ctx, make(ctx, ddp, optimizer), range(STEPS))


def check_equal(got, expected):
    assert got.keys() == expected.keys()
    for name in got:
        assert torch.equal(got[name], expected[name]), name


def check_close(got, expected, atol=1e-12):
    assert got.keys() == expected.keys()
    assert max((got[name] - expected[name]).abs().max().item() for name in got) < atol


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("world_size", [2, 4])
def test_sharded_states_train_bitwise_as_replicated_ones(world_size, optimizer):
    rows = [simulate(train, world_size, ddp, optimizer) for ddp in (ZERO, PLAIN)]
    for got, expected in zip(*rows, strict=True):
        check_equal(got, expected)


def test_processes_equal_a_simulation_and_one_process():
    alone = train(fake_context(0, 1), ZERO)
    for real, simulated in zip(run_ranks(train, 2, ZERO), simulate(train, 2, ZERO), strict=True):
        check_equal(real, simulated)
        check_close(real, alone)


def num_elements(ctx, ddp):
    state = make(ctx, ddp)
    run(ctx, state, range(2))
    opt = getattr(state["opt"], "optim", state["opt"])
    return sum(x.numel() for state in opt.state.values() for x in state.values())


def test_each_rank_stores_its_shard_of_the_states():
    num_replicated = num_elements(fake_context(0, 1), PLAIN)
    num_per_rank = simulate(num_elements, 4, ZERO)
    assert sum(num_per_rank) == num_replicated
    assert max(num_per_rank) < 0.3 * num_replicated


def test_one_process_and_frozen_models_keep_their_optimizer():
    ctx = fake_context(0, 1)
    net = faccel.wrap(nn.Linear(2, 1), ctx, plan=faccel.Plan(ddp=ZERO))
    opt = torch.optim.AdamW(net.parameters())
    assert faccel.wrap_optimizer(opt, net, ctx) is opt

    def fn(ctx):
        net = faccel.wrap(nn.Linear(2, 1).requires_grad_(False), ctx, plan=faccel.Plan(ddp=ZERO))
        opt = torch.optim.AdamW(net.parameters())
        assert faccel.wrap_optimizer(opt, net, ctx) is opt

    simulate(fn, 2)


def test_the_users_optimizer_is_not_changed():
    def fn(ctx):
        net = faccel.wrap(nn.Linear(2, 3), ctx, plan=faccel.Plan(ddp=ZERO))
        opt = torch.optim.Adagrad(net.named_parameters(), lr=0.1)
        before = opt.state_dict()
        sharded = faccel.wrap_optimizer(opt, net, ctx)
        net(torch.ones(1, 2)).sum().backward()
        sharded.step()
        sharded.param_groups[0]["lr"] = 1.0
        assert [
            p is q for p, q in zip(opt.param_groups[0]["params"], net.parameters(), strict=True)
        ] == [True, True]
        assert opt.state_dict()["param_groups"] == before["param_groups"]

    simulate(fn, 2)


def wrapped_late(ctx, ddp):
    """Step twice with the user's optimizer before `wrap_optimizer`."""
    net = faccel.wrap(model(), ctx, plan=faccel.Plan(ddp=ddp))
    opt = OPTIMIZERS["SGD"](groups_of(net))
    for update in range(STEPS):
        opt = faccel.wrap_optimizer(opt, net, ctx) if update == 2 else opt
        rows = tokens(ROWS, seed=update).chunk(ctx.data_world_size)[ctx.data_rank]
        opt.zero_grad()
        loss_of(net(rows[:, :-1]), rows[:, 1:]).backward()
        opt.step()
    return dict(net.named_parameters())


def test_existing_states_of_an_optimizer_are_sharded():
    for got, expected in zip(
        simulate(wrapped_late, 2, ZERO), simulate(wrapped_late, 2, PLAIN), strict=True
    ):
        check_equal(got, expected)


def with_a_new_group(ctx, ddp, path):
    """Train one group, add the others, save, and resume from the file."""
    net = faccel.wrap(model(), ctx, plan=faccel.Plan(ddp=ddp))
    first, *others = groups_of(net)
    opt = faccel.wrap_optimizer(OPTIMIZERS["AdamW"]([first]), net, ctx)
    schedule = torch.optim.lr_scheduler.ConstantLR(opt, 1.0)
    run(ctx, {"model": net, "opt": opt, "schedule": schedule}, range(2))
    for param in net.parameters():
        param.grad = None
    for group in others:
        opt.add_param_group(group)
    schedule = torch.optim.lr_scheduler.StepLR(opt, 2, gamma=0.5)
    state = {"model": net, "opt": opt, "schedule": schedule}
    run(ctx, state, range(2, STEPS))
    faccel.save(state, path, ctx, step=STEPS)
    return run(ctx, faccel.load(make(ctx, ddp), path, ctx), range(STEPS, STEPS + 1))


@pytest.mark.parametrize("world_size", [2, 4])
def test_groups_that_are_added_later_are_sharded_too(tmp_path, world_size):
    rows = [
        simulate(with_a_new_group, world_size, ddp, tmp_path / str(ddp.shard_optimizer))
        for ddp in (ZERO, PLAIN)
    ]
    for got, expected in zip(*rows, strict=True):
        check_equal(got, expected)


def resumed(ctx, path, layouts):
    """Save in one layout after 3 steps, resume in another."""
    state = make(ctx, layouts[0])
    run(ctx, state, range(3))
    faccel.save(state, path, ctx, step=3)
    again = faccel.load(make(ctx, layouts[1]), path, ctx)
    return run(ctx, again, range(3, STEPS))


@pytest.mark.slow
@pytest.mark.parametrize(
    "layouts", [(ZERO, ZERO), (ZERO, PLAIN), (PLAIN, ZERO)], ids=["both", "saved", "loaded"]
)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_resumed_run_is_the_same_run_with_sharded_and_replicated_states(
    tmp_path, world_size, layouts
):
    def fn(ctx):
        state = make(ctx, PLAIN)
        run(ctx, state, range(3))
        return run(ctx, state, range(3, STEPS))

    for got, expected in zip(
        simulate(resumed, world_size, tmp_path, layouts), simulate(fn, world_size), strict=True
    ):
        check_equal(got, expected)


def load_and_resume(ctx, path):
    return run(ctx, faccel.load(make(ctx, ZERO), path, ctx), range(3, STEPS))


def test_any_world_size_loads_the_checkpoint_of_another(tmp_path):
    first = simulate(resumed, 2, tmp_path, (ZERO, ZERO))[0]
    for world_size in (1, 4):
        check_close(simulate(load_and_resume, world_size, tmp_path)[0], first)


def test_processes_save_and_load(tmp_path):
    real = run_ranks(resumed, 2, tmp_path / "real", (ZERO, ZERO))
    simulated = simulate(resumed, 2, tmp_path / "simulated", (ZERO, ZERO))
    check_equal(real[1], simulated[1])


def test_a_state_dict_is_full_on_every_rank_and_loading_does_not_change_it():
    def fn(ctx):
        state = make(ctx, ZERO)
        run(ctx, state, range(2))
        full_state = state["opt"].state_dict()
        assert sorted(full_state["state"]) == list(range(36))
        assert state["opt"]._all_state_dicts == []  # shards of the other ranks are released
        before = {
            i: {name: x.clone() for name, x in tensors.items()}
            for i, tensors in full_state["state"].items()
        }
        again = make(ctx, ZERO)["opt"]
        again.load_state_dict(full_state)
        loaded = again.state_dict()
        for i, tensors in before.items():
            for name, x in tensors.items():
                assert torch.equal(full_state["state"][i][name], x)
                assert torch.equal(loaded["state"][i][name], x)
        assert loaded["param_groups"] == full_state["param_groups"]
        return before

    expected = simulate(plain_state, 2)[0]
    for states in simulate(fn, 2):
        for tensors, expected_tensors in zip(states.values(), expected.values(), strict=True):
            check_equal(tensors, expected_tensors)


def plain_state(ctx):
    state = make(ctx, PLAIN)
    run(ctx, state, range(2))
    return state["opt"].state_dict()["state"]


def test_a_state_with_other_groups_is_an_error():
    def fn(ctx):
        state = make(ctx, ZERO)
        full_state = state["opt"].state_dict()
        full_state["param_groups"] = full_state["param_groups"][:2]
        with pytest.raises(OptimizerError, match="groups"):
            state["opt"].load_state_dict(full_state)

    simulate(fn, 2)


class Broken:
    def state_dict(self):
        raise KeyError("of the user")

    def load_state_dict(self, state):
        pass


@pytest.mark.parametrize("bad_first", [True, False])
@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_on_one_rank_reaches_the_others_around_a_collective_state(
    tmp_path, bad_first, rank
):
    def fn(ctx):
        state = make(ctx, ZERO)
        bad = {"bad": Broken() if ctx.rank == rank else 0}
        with pytest.raises(CheckpointError):
            faccel.save(bad | state if bad_first else state | bad, tmp_path, ctx, step=1)
        faccel.save(state, tmp_path, ctx, step=1)

    simulate(fn, 2)


def test_an_optimizer_that_cannot_be_sharded_is_an_error():
    def fn(ctx):
        net = faccel.wrap(nn.Linear(2, 1), ctx, plan=faccel.Plan(ddp=ZERO))
        with pytest.raises(OptimizerError, match="LBFGS"):
            faccel.wrap_optimizer(torch.optim.LBFGS(net.parameters()), net, ctx)
        opt = torch.optim.SGD(net.parameters(), lr=0.1)
        torch.optim.lr_scheduler.StepLR(opt, 2)
        with pytest.raises(OptimizerError, match="scheduler"):
            faccel.wrap_optimizer(opt, net, ctx)

    simulate(fn, 2)
