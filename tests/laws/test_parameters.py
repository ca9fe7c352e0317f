"""The parameter law: at any time, model, optimizer and state dict name the same parameters.

The optimizer moves all of them. On every strategy; DeepSpeed needs real processes.
"""

import os
import pathlib
import shutil

import pytest
import torch
from torch import nn

import faccel
from faccel.backends.table import BACKENDS
from faccel.errors import ModelError
from faccel.testing import simulate
from faccel.tree import full_tensor, local_tensor
from tests.laws.test_backends import PLAN, Net, rows
from tests.ranks import run_ranks
from tests.training import RaisesInBackward

NUMBERED = pathlib.Path(__file__).parent.parent / "golden" / "numbered_optimizer"
SHARDS_OPTIMIZER = faccel.Plan(ddp=faccel.parallel.DdpConfig(shard_optimizer=True))
pytestmark = pytest.mark.filterwarnings("ignore")  # PyTorch's advice on layouts


def plan_of(**fsdp):
    return faccel.Plan(
        units=PLAN.units,
        tensor=PLAN.tensor,
        pipeline=PLAN.pipeline,
        fsdp=faccel.parallel.FsdpConfig(**fsdp),
    )


WORLDS = {
    "single": (1, None, PLAN),
    "ddp": (2, None, PLAN),
    "zero-1": (2, None, SHARDS_OPTIMIZER),
    "fsdp": (2, "dp_shard=2", PLAN),
    "fsdp-no-reshard": (2, "dp_shard=2", plan_of(reshard_after_forward=False)),
    "fsdp-reshard-to-2": (4, "dp_shard=4", plan_of(reshard_after_forward=2)),
    "fsdp-checkpointing": (
        2,
        "dp_shard=2",
        faccel.Plan(units="Layer", activation_checkpoint="full"),
    ),
    "hsdp": (4, "dp_replicate=2,dp_shard=2", PLAN),
    "tp": (2, "tp=2", PLAN),
    "fsdp-tp": (4, "dp_shard=2,tp=2", PLAN),
    "cp": (2, "cp=2", PLAN),
    "pp": (2, "pp=2", PLAN),
    "pp-fsdp": (4, "pp=2,dp_shard=2", PLAN),
}


class ParameterLaw:
    """The objects after `wrap`, and the comparison with those at a later moment."""

    def __init__(self, ctx, net, plan):
        self.ctx, self.net = ctx, net
        self.model = faccel.wrap(net, ctx, plan=plan)
        self.params = dict(self.model.named_parameters())

    def check(self, moment, opt=None):
        for source in (self.model, self.net, self.model.module):
            params = dict(source.named_parameters())
            assert params.keys() == self.params.keys(), moment
            for name, param in params.items():
                assert param is self.params[name], (moment, name)
        for name, entry in self.model.state_dict().items():
            if name in self.params and self.ctx.parallelism.name != "deepspeed":
                address = local_tensor(entry).data_ptr()
                assert address == local_tensor(self.params[name]).data_ptr(), (moment, name)
        # The flat parameters of ZeRO take the places of the user's in the groups.
        if opt is not None and self.ctx.parallelism.name != "deepspeed":
            stepped = [id(param) for group in opt.param_groups for param in group["params"]]
            assert sorted(stepped) == sorted(map(id, self.params.values())), moment


def values(model):
    return {name: full_tensor(value).clone() for name, value in model.state_dict().items()}


def evaluate(model):
    with torch.no_grad():
        return model(rows().float())


def backward(ctx, model, scaler):
    loader = torch.utils.data.DataLoader(rows().float(), 4 // ctx.data_world_size)
    window = next(faccel.windows(faccel.shard(loader, ctx), ctx, size=4))
    loss_fn = lambda f, batch: f(batch.data).square().mean()  # noqa: E731
    return faccel.forward_backward(loss_fn, model, window, scaler, ctx)[1]


def law(ctx, plan, folder):
    """One run through all moments; returns the values after two updates."""
    net = Net(ctx.rank)
    law = ParameterLaw(ctx, net, plan)
    model = law.model
    law.check("after wrap")
    has_engine = ctx.parallelism.name != "deepspeed"
    if has_engine:
        evaluate(model)
        law.check("after an evaluation before the optimizer is made")
    opt = torch.optim.AdamW(model.parameters(), lr=0.1)
    opt = faccel.wrap_optimizer(opt, model, ctx)
    law.check("after wrap_optimizer", opt)
    if ctx.mesh.spec.pp == 1:
        model(rows().float())
        law.check("after forward", opt)
    evaluate(model)
    law.check("after evaluation", opt)
    scaler = faccel.init_scaler(ctx)
    for _ in range(2):
        before = values(model)
        scaler = backward(ctx, model, scaler)
        law.check("after backward", opt)
        evaluate(model)
        law.check("after an evaluation between backward and step", opt)
        _, scaler = faccel.optimizer_step(opt, scaler, ctx)
        law.check("after step", opt)
        after = values(model)
        still = [name for name in law.params if torch.equal(before[name], after[name])]
        assert not still
    evaluate(model)
    faccel.save({"model": model, "opt": opt}, folder, ctx, step=2)
    law.check("after save", opt)
    evaluate(model)
    faccel.load({"model": model, "opt": opt}, folder, ctx)
    law.check("after load", opt)
    evaluate(model)
    faccel.checkpoint.export_model(model, os.path.join(folder, "export"), ctx)
    law.check("after export", opt)
    loaded = values(model)
    assert all(torch.equal(loaded[name], value) for name, value in after.items())
    return {name: loaded[name] for name in law.params}


def one_process():
    """What plain torch makes of the same batches."""
    net = Net(0)
    opt = torch.optim.AdamW(net.parameters(), lr=0.1)
    for _ in range(2):
        net(rows().float()).square().mean().backward()
        opt.step()
        opt.zero_grad()
    return dict(net.named_parameters())


def check_law(results):
    expected = one_process()
    names = set()
    for params in results:
        names |= params.keys()
        for name, value in params.items():
            assert torch.allclose(value, expected[name], atol=1e-4), name
    assert names == expected.keys()


@pytest.mark.parametrize("world", WORLDS)
def test_the_parameters_are_the_same_objects_at_every_moment(world, tmp_path):
    world_size, mesh, plan = WORLDS[world]
    check_law(simulate(law, world_size, plan, str(tmp_path), mesh=mesh))


@pytest.mark.slow
def test_the_parameters_are_the_same_objects_over_gloo(tmp_path):
    check_law(run_ranks(law, 2, PLAN, str(tmp_path), mesh="dp_shard=2"))


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_the_parameters_are_the_same_objects_under_deepspeed(zero, tmp_path):
    reason = BACKENDS["deepspeed"].probe(os.environ)
    if reason is not None:
        pytest.skip(reason)
    check_law(run_ranks(law, 2, PLAN, str(tmp_path), strategy="deepspeed", zero=zero))


# The moments at which FSDP2 has other tensors in the modules.


@pytest.mark.parametrize("mesh", ["dp_shard=2", "tp=2"])
def test_a_change_between_two_forwards_takes_effect(mesh):
    """FSDP2 does not gather again what stayed gathered for a backward that never came."""

    def fn(ctx):
        model = faccel.wrap(Net(0), ctx, plan=PLAN)
        outputs = []
        for _ in range(2):
            outputs.append(model(rows().float()).detach())
            with torch.no_grad():
                for param in model.parameters():
                    param.mul_(2.0)
        return outputs

    net = Net(0)
    expected = net(rows().float())
    with torch.no_grad():
        for param in net.parameters():
            param.mul_(2.0)
    for outputs in simulate(fn, 2, mesh=mesh):
        assert torch.allclose(outputs[0], expected, atol=1e-5)
        assert torch.allclose(outputs[1], net(rows().float()), atol=1e-4)


def collectives(fn, *args, **options):
    return [event.op for event in simulate(fn, 2, *args, **options).trace if event.rank == 0]


def test_two_forwards_before_a_backward_gather_the_root_once():
    def fn(ctx, num_forwards):
        model = faccel.wrap(nn.Linear(4, 4), ctx)
        loss = sum(model(rows().float()).square().mean() for _ in range(num_forwards))
        faccel.scaled_backward(loss, faccel.init_scaler(ctx), ctx)

    once, twice = (collectives(fn, number, mesh="dp_shard=2") for number in (1, 2))
    assert once == twice


class Failing(Net):
    fails = False

    def forward(self, x):
        out = super().forward(x)
        if self.fails:
            raise ValueError("a bad batch")
        return out


@pytest.mark.parametrize("has_grad", [False, True])
@pytest.mark.parametrize("world", ["ddp", "fsdp", "fsdp-no-reshard", "hsdp", "tp", "cp"])
def test_a_forward_that_raises_leaves_the_parameters(world, has_grad):
    def fn(ctx, plan):
        net = Failing(0)
        law = ParameterLaw(ctx, net, plan)
        net.fails = True
        with pytest.raises(ValueError, match="a bad batch"), torch.set_grad_enabled(has_grad):
            law.model(rows().float())
        net.fails = False
        law.check("after a forward that raised")
        opt = torch.optim.AdamW(law.model.parameters(), lr=0.1)
        opt = faccel.wrap_optimizer(opt, law.model, ctx)
        scaler = faccel.init_scaler(ctx)
        for _ in range(2):
            scaler = backward(ctx, law.model, scaler)
            _, scaler = faccel.optimizer_step(opt, scaler, ctx)
        loaded = values(law.model)
        return {name: loaded[name] for name in law.params}

    world_size, mesh, plan = WORLDS[world]
    check_law(simulate(fn, world_size, plan, mesh=mesh))


@pytest.mark.parametrize("world", ["ddp", "fsdp", "fsdp-no-reshard", "hsdp", "tp", "pp-fsdp"])
def test_a_model_that_was_evaluated_in_inference_mode_trains(world):
    def fn(ctx, plan):
        law = ParameterLaw(ctx, Net(0), plan)
        opt = torch.optim.AdamW(law.model.parameters(), lr=0.1)
        opt = faccel.wrap_optimizer(opt, law.model, ctx)
        scaler = faccel.init_scaler(ctx)
        for _ in range(2):
            with torch.inference_mode():
                law.model(rows().float())
            law.check("after an evaluation in inference mode")
            scaler = backward(ctx, law.model, scaler)
            _, scaler = faccel.optimizer_step(opt, scaler, ctx)
        loaded = values(law.model)
        return {name: loaded[name] for name in law.params}

    world_size, mesh, plan = WORLDS[world]
    check_law(simulate(fn, world_size, plan, mesh=mesh))


class Normal(nn.Module):
    """Returns an object that is no container of tensors."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 1)
        self.layers = nn.ModuleList([nn.Linear(4, 4)])

    def forward(self, x):
        return torch.distributions.Normal(self.last(self.layers[0](self.first(x))), 1.0)


@pytest.mark.parametrize("mesh", ["dp_replicate=2", "dp_shard=2"])
def test_a_model_may_return_a_distribution(mesh):
    def fn(ctx):
        model = faccel.wrap(Normal(), ctx)
        scaler = faccel.init_scaler(ctx)
        for _ in range(2):  # gradients accumulate
            loss = model(rows().float()).log_prob(torch.ones(1)).mean()
            scaler = faccel.scaled_backward(loss, scaler, ctx)
        return [full_tensor(param.grad) for param in model.parameters()]

    (expected,) = simulate(fn, 1)
    for grads in simulate(fn, 2, mesh=mesh):
        for grad, expected_grad in zip(grads, expected, strict=True):
            assert torch.allclose(grad, expected_grad, atol=1e-5)


@pytest.mark.parametrize("syncs", [True, False])
@pytest.mark.parametrize(
    "world",
    ["single", "ddp", "fsdp", "fsdp-no-reshard", "fsdp-checkpointing", "hsdp", "tp", "cp"],
)
def test_a_loop_continues_after_a_backward_that_raised(world, syncs):
    def fn(ctx, plan):
        net = Net(0)
        law = ParameterLaw(ctx, net, plan)
        model = law.model
        opt = faccel.wrap_optimizer(torch.optim.AdamW(model.parameters(), lr=0.1), model, ctx)
        scaler = faccel.init_scaler(ctx)
        for update in range(2):
            fails = net.layers[1].register_forward_hook(
                lambda *args: RaisesInBackward.apply(args[2], ValueError("a bad batch"))
            )
            loss = model(rows().float()).square().mean()
            fails.remove()
            with faccel.grad_sync(model, on=syncs), pytest.raises(ValueError, match="a bad batch"):
                faccel.scaled_backward(loss, scaler, ctx)
            law.check("after a backward that raised", opt)
            opt.zero_grad(set_to_none=update == 0)
            if world == "ddp":
                if syncs:
                    with pytest.raises(ModelError, match="backward through `model` has raised"):
                        model(rows().float())
                model = faccel.rewrap(model, ctx)
            scaler = backward(ctx, model, scaler)
            _, scaler = faccel.optimizer_step(opt, scaler, ctx)
        loaded = values(model)
        return {name: loaded[name] for name in law.params}

    world_size, mesh, plan = WORLDS[world]
    check_law(simulate(fn, world_size, plan, mesh=mesh))


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 1)

    def hidden(self, x):
        return self.up(x).tanh()

    def forward(self, x):
        x = torch.utils.checkpoint.checkpoint(self.hidden, x, use_reentrant=False)
        return self.down(x)


def test_a_second_forward_in_backward_uses_the_gathered_parameters():
    def fn(ctx):
        model = faccel.wrap(Checkpointed(), ctx)
        faccel.scaled_backward(model(rows().float()).sum(), faccel.init_scaler(ctx), ctx)
        return [full_tensor(param.grad) for param in model.parameters()]

    (expected,) = simulate(fn, 1)
    for grads in simulate(fn, 2, mesh="dp_shard=2"):
        for grad, expected_grad in zip(grads, expected, strict=True):
            assert torch.allclose(grad, expected_grad, atol=1e-5)


# Files of version 0.1.0, whose optimizer was saved after an evaluation: the states of the
# parameters of the root are stored under numbers.


class Numbered(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(3, 2)
        self.blocks = nn.ModuleList([nn.Linear(2, 2)])
        self.last = nn.Linear(2, 1)

    def forward(self, x):
        return self.last(self.blocks[0](self.first(x)).tanh())


def numbered(ctx, path):
    model = faccel.wrap(Numbered(), ctx)
    matrices = [param for param in model.parameters() if param.ndim == 2]
    vectors = [param for param in model.parameters() if param.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    opt = torch.optim.AdamW(groups, lr=0.1)
    opt = faccel.wrap_optimizer(opt, model, ctx)
    if path is not None:
        faccel.load({"model": model, "opt": opt}, path, ctx)
    scaler = faccel.init_scaler(ctx)
    # The file is from after two of these updates.
    for _ in range(1 if path is not None else 3):
        x = torch.arange(12.0).reshape(4, 3)
        scaler = faccel.scaled_backward(model(x).square().mean(), scaler, ctx)
        faccel.optimizer_step(opt, scaler, ctx)
    return values(model)


@pytest.mark.parametrize(
    ("world_size", "mesh"), [(1, None), (2, "dp_shard=2"), (2, "dp_replicate=2")]
)
def test_states_that_were_saved_under_numbers_load(world_size, mesh, tmp_path):
    folder = shutil.copytree(NUMBERED, tmp_path / "old")
    (expected,) = simulate(numbered, 1, None)
    for params in simulate(numbered, world_size, str(folder), mesh=mesh):
        for name, value in params.items():
            assert torch.allclose(value, expected[name], atol=1e-6), name
