"""Full parameters and full state dicts of every layout equal those of one process."""

import copy

import pytest
import torch
from torch import nn

import faccel
from faccel.errors import ConfigError, ModelError, RankFailedError
from faccel.parallel import full_state_dict, gathered
from faccel.testing import fake_context, simulate
from tests.models import model, tokens
from tests.training import full, plan_of

MESHES = (
    "dp_replicate=1", "dp_replicate=2", "dp_shard=2", "dp_shard=3", "dp_replicate=2,dp_shard=2",
    "tp=2", "dp_shard=2,tp=2", "pp=2", "pp=2,dp_shard=2",
)  # fmt: skip
INPUTS = tokens(4)[:, :-1]


class Stateful(nn.Linear):
    """Has an extra state, as layers of fp8 have."""

    def get_extra_state(self):
        return {"scale": 3}

    def set_extra_state(self, state):
        assert state == {"scale": 3}


def make():
    net = model(depth=2)
    net.blocks[1].up = Stateful(16, 64).double()
    net.norm.register_buffer("count", torch.arange(3))
    net.norm.bias.requires_grad_(False)
    return net


def on(mesh, fn, *args):
    world_size = faccel.MeshSpec.of(mesh).size

    def wrapped_fn(ctx):
        return fn(ctx, faccel.wrap(make(), ctx, plan=plan_of(mesh)), *args)

    return simulate(wrapped_fn, world_size, mesh=mesh)


def objects_of(wrapped):
    return {name: id(param) for name, param in wrapped.named_parameters()}


def logits_of(wrapped):
    with torch.no_grad():
        return full(wrapped(INPUTS))


@pytest.mark.parametrize("rank", [0, 1, None])
@pytest.mark.parametrize("mesh", MESHES)
def test_a_full_state_dict_equals_that_of_one_process(mesh, rank):
    world_size = faccel.MeshSpec.of(mesh).size
    rank = None if rank == 1 and world_size == 1 else rank
    net = make()
    expected = net.state_dict()

    def fn(ctx, wrapped):
        before = objects_of(wrapped)
        state = full_state_dict(wrapped, ctx, rank=rank)
        assert objects_of(wrapped) == before
        # A copy: later updates do not change it.
        with torch.no_grad():
            for param in wrapped.parameters():
                faccel.tree.local_tensor(param).zero_()
        return state

    for index, state in enumerate(on(mesh, fn)):
        if rank not in (None, index):
            assert state == {}
            continue
        assert state.keys() == expected.keys()
        for name, value in expected.items():
            if isinstance(value, torch.Tensor):
                assert type(state[name]) is torch.Tensor and torch.equal(state[name], value), name
            else:
                assert state[name] == value
        assert state["head.weight"] is state["embed.token.weight"]  # still tied
        net.load_state_dict(state)


@pytest.mark.parametrize("mesh", MESHES)
def test_gathered_parameters_are_plain_and_the_modules_get_theirs_back(mesh):
    expected = dict(make().named_parameters(remove_duplicate=False))

    def fn(ctx, wrapped):
        before, logits = objects_of(wrapped), logits_of(wrapped)
        for raises in (False, True):
            try:
                with gathered(wrapped, ctx) as params:
                    assert params.keys() == expected.keys()
                    for name, param in params.items():
                        assert type(param) is nn.Parameter and torch.equal(param, expected[name])
                    for name, param in wrapped.named_parameters():
                        assert param is params[name]
                        assert param.requires_grad == expected[name].requires_grad
                    if raises:
                        1 / 0  # noqa: B018
            except ZeroDivisionError:
                pass
            assert objects_of(wrapped) == before
            assert torch.equal(logits_of(wrapped), logits)
        return True

    assert all(on(mesh, fn))


@pytest.mark.parametrize("modifier_rank", [0, 1])
@pytest.mark.parametrize("mesh", MESHES)
def test_what_the_modifier_rank_writes_is_written_on_every_rank(mesh, modifier_rank):
    world_size = faccel.MeshSpec.of(mesh).size
    modifier_rank = min(modifier_rank, world_size - 1)
    net = make()
    with torch.no_grad():
        for param in net.parameters():
            param.mul_(0.5).add_(modifier_rank)
    logits = net(INPUTS).detach()

    def fn(ctx, wrapped):
        logits_of(wrapped)  # an earlier forward must leave nothing that is gathered
        before = objects_of(wrapped)
        with gathered(wrapped, ctx, modifier_rank=modifier_rank) as params, torch.no_grad():
            for param in {id(param): param for param in params.values()}.values():
                param.mul_(0.5).add_(ctx.rank)  # other values on every rank
        assert objects_of(wrapped) == before
        return full_state_dict(wrapped, ctx, rank=None), logits_of(wrapped)

    for state, got in on(mesh, fn):
        for name, param in net.named_parameters(remove_duplicate=False):
            assert torch.equal(state[name], param), name
        assert torch.allclose(got, logits, atol=1e-9)


@pytest.mark.parametrize("mesh", ["dp_replicate=1", "dp_replicate=2", "dp_shard=2", "pp=2"])
def test_after_an_exception_of_one_rank_nothing_is_written_and_no_rank_waits(mesh):
    expected = make().state_dict()

    def fn(ctx, wrapped):
        error = ZeroDivisionError if ctx.is_main else RankFailedError
        with pytest.raises(error), gathered(wrapped, ctx, modifier_rank=0) as params:
            with torch.no_grad():
                for param in params.values():
                    param.zero_()
            if ctx.is_main:
                1 / 0  # noqa: B018
        return full_state_dict(wrapped, ctx, rank=None)

    for state in on(mesh, fn):
        for name, value in expected.items():
            assert not isinstance(value, torch.Tensor) or torch.equal(state[name], value), name


@pytest.mark.parametrize("mesh", ["dp_replicate=1", "dp_replicate=2", "dp_shard=2"])
def test_writing_without_a_modifier_rank_raises_and_names_the_parameter(mesh):
    def fn(ctx, wrapped):
        with (
            pytest.raises(ModelError, match=r"`norm\.weight` was changed"),
            gathered(wrapped, ctx) as params,
            torch.no_grad(),
        ):
            params["norm.weight"].zero_()

    on(mesh, fn)


@pytest.mark.parametrize("has_run", [False, True])
@pytest.mark.parametrize("mesh", ["dp_replicate=1", "dp_replicate=2", "dp_shard=2", "tp=2"])
def test_a_call_of_the_model_inside_raises(mesh, has_run):
    def fn(ctx, wrapped):
        if has_run:
            logits_of(wrapped)
        params = objects_of(wrapped)
        with pytest.raises(ModelError, match="called inside"), gathered(wrapped, ctx):
            logits_of(wrapped)
        assert objects_of(wrapped) == params
        return logits_of(wrapped)

    with torch.no_grad():
        expected = make()(INPUTS)
    for logits in on(mesh, fn):
        assert torch.allclose(logits, expected, atol=1e-6)


@pytest.mark.parametrize("mesh", ["dp_replicate=2", "dp_shard=2"])
def test_an_optimizer_trains_what_was_written(mesh):
    net = nn.Linear(3, 2)
    opt = torch.optim.AdamW(net.parameters(), lr=0.1)
    start = copy.deepcopy(net)
    nn.init.zeros_(net.weight)
    net(torch.ones(4, 3)).sum().backward()
    opt.step()

    def fn(ctx):
        wrapped = faccel.wrap(copy.deepcopy(start), ctx)
        opt = torch.optim.AdamW(wrapped.parameters(), lr=0.1)
        opt = faccel.wrap_optimizer(opt, wrapped, ctx)
        with gathered(wrapped, ctx, modifier_rank=0):
            nn.init.zeros_(wrapped.module.weight)
        loss = wrapped(torch.ones(4, 3)).sum()
        scaler = faccel.scaled_backward(loss, faccel.init_scaler(ctx), ctx)
        faccel.optimizer_step(opt, scaler, ctx)
        return full_state_dict(wrapped, ctx, rank=None)

    for state in simulate(fn, 2, mesh=mesh):
        assert all(torch.allclose(state[name], value) for name, value in net.state_dict().items())


@pytest.mark.parametrize("rank", [-1, 2, True, "0"])
def test_a_rank_outside_of_the_world_raises(rank):
    ctx = fake_context(0, 1)
    wrapped = faccel.wrap(nn.Linear(3, 2), ctx)
    with pytest.raises(ConfigError, match="`rank` must be a rank below 1"):
        full_state_dict(wrapped, ctx, rank=rank)
    with pytest.raises(ConfigError, match="`modifier_rank` must be a rank below 1"):
        gathered(wrapped, ctx, modifier_rank=rank)
