"""Loading a part of a checkpoint: other heads, new layers, other names, tensors without a model."""

import pytest
import torch
from torch import nn

import faccel
from faccel.errors import CheckpointError, ConfigError
from faccel.testing import fake_context, simulate

ONE = fake_context(0, 1)
MESHES = ("dp_replicate=1", "dp_shard=2")


class Net(nn.ModuleDict):
    """Layers by name; FSDP2 needs a `forward`, which is never called."""

    def forward(self, x):
        raise NotImplementedError


def net(classes=2, name="body", dtype=torch.float32, extra=False, seed=0):
    torch.manual_seed(seed)
    layers = {name: nn.Linear(4, 4), "head": nn.Linear(4, classes)}
    if extra:
        layers["extra"] = nn.Linear(2, 2)
    return Net(layers).to(dtype)


def state_of(ctx, **options):
    model = faccel.wrap(net(**options), ctx)
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    opt.step()
    return {"model": model, "opt": opt, "step": 1}


def full(tensor):
    return getattr(tensor, "full_tensor", lambda: tensor)().detach().clone()


def tensors(state):
    """Return parameters and momenta by the names of the parameters."""
    result = {}
    for name, param in state["model"].named_parameters():
        moments = state["opt"].state[param].get("momentum_buffer")
        result[name] = (full(param), full(moments))
    return result


def saved_by_one_process():
    """Return the tensors that `save` stores, from plain PyTorch."""
    module = net()
    expected = {}
    for name, param in module.named_parameters():
        expected[name] = param.detach() - 0.1
    return expected


def load_into(ctx, path, rename, options):
    state = state_of(ctx, seed=1, **options)
    # otherwise the momenta are ones before and after
    for entry in state["opt"].state.values():
        entry["momentum_buffer"] *= 3
    before = tensors(state)
    loaded, report = faccel.load(state, path, ctx, strict=False, rename=rename)
    assert loaded["model"] is state["model"]
    return tensors(state), before, report


CASES = {
    "equal": ({}, {}, {}, [], {}),
    "another head": (
        {"classes": 3}, {}, {}, ["head.weight", "head.bias"],
        {"mismatched": ("model.head.bias", "model.head.weight")},
    ),
    "another name": (
        {"name": "backbone"}, {}, {"body": "backbone"},
        ["backbone.weight", "backbone.bias"],
        {
            "missing": ("model.backbone.bias", "model.backbone.weight"),
            "unexpected": ("model.body.bias", "model.body.weight"),
            "mismatched": ("opt.param_groups",),
        },
    ),
    "renamed": (
        {"name": "backbone"}, {"model.body": "model.backbone"}, {"backbone": "body"}, [], {},
    ),
    "renamed twice": (
        {"name": "backbone"}, {"model.body": "model.x", "model.x": "model.backbone"},
        {"backbone": "body"}, [], {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("case", CASES)
def test_what_fits_is_loaded_and_all_else_is_named(tmp_path, case, mesh):
    options, rename, names, untouched, fields = CASES[case]
    world_size = faccel.MeshSpec.of(mesh).size
    simulate(lambda ctx: faccel.save(state_of(ctx), tmp_path, ctx, step=1), 3)
    expected = saved_by_one_process()
    for after, before, report in simulate(
        load_into, world_size, tmp_path, rename, options, mesh=mesh
    ):
        for field in ("missing", "unexpected", "mismatched"):
            assert getattr(report, field) == fields.get(field, ()), field
        for name, (param, momentum) in after.items():
            if name in untouched:
                assert torch.equal(param, before[name][0]), name
                assert torch.equal(momentum, before[name][1]), name
                continue
            first, _, last = name.partition(".")
            assert torch.equal(param, expected[f"{names.get(first, first)}.{last}"]), name
            # an optimizer whose parameters have other names is left as it is
            is_left = "opt.param_groups" in report.mismatched
            assert momentum.unique().item() == (3.0 if is_left else 1.0), name


def test_a_layer_more_and_a_layer_less(tmp_path):
    faccel.save({"model": net(extra=True)}, tmp_path, ONE, step=1)
    _, report = faccel.load({"model": net()}, tmp_path, ONE, strict=False)
    assert report.unexpected == ("model.extra.bias", "model.extra.weight")
    faccel.save({"model": net(), "step": 7}, tmp_path, ONE, step=2)
    larger = net(extra=True, seed=1)
    before = larger["extra"].weight.clone()
    state = {"model": larger, "step": 0, "ema_step": 5}
    loaded, report = faccel.load(state, tmp_path, ONE, strict=False)
    assert report.missing == ("ema_step", "model.extra.bias", "model.extra.weight")
    assert (loaded["step"], loaded["ema_step"]) == (7, 5)
    assert torch.equal(larger["extra"].weight, before)
    assert torch.equal(larger["body"].weight, net()["body"].weight)


def test_values_are_cast_to_the_dtype_of_the_model(tmp_path):
    faccel.save({"model": net()}, tmp_path, ONE, step=1)
    low = net(dtype=torch.bfloat16, seed=1)
    _, report = faccel.load({"model": low}, tmp_path, ONE, strict=False)
    assert torch.equal(low["body"].weight, net()["body"].weight.bfloat16())
    assert report.missing + report.unexpected + report.mismatched == ()


RENAMES = {
    "a key": ({"net": net(), "n": 1}, {"net": "model"}, lambda new: {"model": new, "n": 0}),
    "a prefix less": (
        {"model": nn.ModuleDict({"module": net()})}, {"model.module": "model"},
        lambda new: {"model": new},
    ),
    "a prefix more": (
        {"model": net()}, {"model": "model.module"},
        lambda new: {"model": nn.ModuleDict({"module": new})},
    ),
    "a model that is the state": (net(), {"body": "body"}, None),
    "a key below": ({"a": {"b": net()}}, {"a.b": "a.c"}, lambda new: {"a": {"c": new}}),
    "both": (
        {"net": net()}, {"net": "model", "model.body": "model.backbone"},
        lambda new: {"model": new},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RENAMES)
def test_names_are_replaced_before_the_state_is_compared(tmp_path, name):
    state, rename, build = RENAMES[name]
    faccel.save(state, tmp_path, ONE, step=1)
    if build is None:
        with pytest.raises(ConfigError, match="not in the checkpoint"):
            faccel.load(net(), tmp_path, ONE, rename=rename)
        return
    new = net(name="backbone" if name == "both" else "body", seed=1)
    faccel.load(build(new), tmp_path, ONE, rename=rename)
    for param, expected in zip(new.parameters(), net().parameters(), strict=True):
        assert torch.equal(param, expected)


@pytest.mark.parametrize("rename", [
    {"modle": "model"}, {"model.bdy": "model.x"}, {"model.body": "other.body"},
    {"step": "model"}, {"model.body": "model.head"},
])  # fmt: skip
def test_a_wrong_name_raises_on_every_rank_and_changes_nothing(tmp_path, rename):
    faccel.save({"model": net(), "step": 1}, tmp_path, ONE, step=1)

    def run(ctx):
        model = net(seed=1)
        before = model["body"].weight.clone()
        with pytest.raises(ConfigError, match="`rename`"):
            faccel.load({"model": model}, tmp_path, ctx, strict=False, rename=rename)
        assert torch.equal(model["body"].weight, before)

    simulate(run, 2)


def test_strict_is_the_default(tmp_path):
    faccel.save({"model": net(), "step": 1}, tmp_path, ONE, step=1)
    for state in ({"model": net(3)}, {"model": net(extra=True)}, {"other": 1}):
        with pytest.raises(CheckpointError, match="does not fit"):
            faccel.load(state, tmp_path, ONE)


class Broken:
    def state_dict(self):
        return {"x": 1}

    def load_state_dict(self, state):
        raise KeyError("a new field")


@pytest.mark.parametrize("mesh", ["dp_replicate=2", "dp_shard=2"])
def test_an_object_that_refuses_its_state_is_named(tmp_path, mesh):
    def run(ctx):
        first = faccel.wrap(net(), ctx)
        faccel.save({"a": first, "c": Broken()}, tmp_path, ctx, step=1)
        second = faccel.wrap(net(seed=1), ctx)
        before = [full(param) for param in second.parameters()]
        with pytest.raises(CheckpointError, match=r"a Broken raised in .* the state is unchanged"):
            faccel.load({"a": second, "c": Broken()}, tmp_path, ctx)
        assert all(map(torch.equal, before, [full(param) for param in second.parameters()]))

    simulate(run, 2, mesh=mesh)


def test_models_in_a_container_of_another_kind_raise(tmp_path):
    faccel.save({"list": [net()], "dict": {0: net()}}, tmp_path, ONE, step=1)
    for state in ({"list": {0: net()}}, {"dict": [net()]}, {"dict": (net(),)}):
        with pytest.raises(CheckpointError, match="in the checkpoint, a"):
            faccel.load(state, tmp_path, ONE)


def layers_on_a_mesh(ctx, num_layers):
    chain = tuple(str(number) for number in range(num_layers))
    stages = faccel.parallel.PipelineConfig(chain=chain)
    net = nn.Sequential(*[nn.Linear(2, 2) for _ in chain])
    model = faccel.wrap(net, ctx, plan=faccel.Plan(pipeline=stages))
    opt = faccel.wrap_optimizer(torch.optim.SGD(model.parameters(), 0.1), model, ctx)
    return {"model": model, "opt": opt, "ema": faccel.parallel.init_ema(model, ctx)}


@pytest.mark.parametrize("keys", [("model",), ("model", "opt"), ("ema",)], ids=",".join)
def test_a_pipeline_does_not_load_a_part_of_a_larger_model(tmp_path, keys):
    def save(ctx):
        faccel.save(layers_on_a_mesh(ctx, 3), tmp_path, ctx, step=1)

    def load(ctx, num_layers):
        state = layers_on_a_mesh(ctx, num_layers)
        faccel.load({key: state[key] for key in keys}, tmp_path, ctx)
        return state["model"].state_dict()

    simulate(save, 1)
    assert sum(len(state) for state in simulate(load, 2, 3, mesh="pp=2")) == 6
    with pytest.raises(CheckpointError, match=r"2\.bias.*2\.weight.* only in the checkpoint"):
        simulate(load, 2, 2, mesh="pp=2")


@pytest.mark.parametrize("frozen", [0, 2], ids=["first stage", "last stage"])
def test_a_checkpoint_without_the_frozen_layer_of_one_stage_loads(frozen, tmp_path):
    chain = ("0", "1", "2")
    plan = faccel.Plan(pipeline=faccel.parallel.PipelineConfig(chain=chain))

    def state_of(ctx, value):
        net = nn.Sequential(*[nn.Linear(2, 2) for _ in chain])
        for param in net.parameters():
            nn.init.constant_(param, value)
        net[frozen].requires_grad_(requires_grad=False)
        return {"model": faccel.wrap(net, ctx, plan=plan)}

    def fn(ctx):
        faccel.save(state_of(ctx, 1.0), tmp_path, ctx, step=1, trained_only=True)
        loaded = faccel.load(state_of(ctx, 0.0), tmp_path, ctx)["model"]
        state = loaded.state_dict()
        return {name: faccel.tree.full_tensor(value).mean().item() for name, value in state.items()}

    first, second = simulate(fn, 2, mesh="pp=2")
    for name, value in (first | second).items():
        assert value == float(not name.startswith(f"{frozen}."))


class Tied(nn.Module):
    def __init__(self, *, tied):
        super().__init__()
        self.first, self.last = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        if tied:
            self.last.weight = self.first.weight

    def forward(self, x):
        return self.last(self.first(x))


def test_a_pipeline_of_tied_stages_does_not_load_the_optimizer_of_two_parameters(tmp_path):
    def state_of(ctx, *, tied):
        stages = faccel.parallel.PipelineConfig(chain=("first", "last"))
        model = faccel.wrap(Tied(tied=tied), ctx, plan=faccel.Plan(pipeline=stages))
        opt = faccel.wrap_optimizer(torch.optim.SGD(model.parameters(), 0.1), model, ctx)
        return {"model": model, "opt": opt}

    def save(ctx, tied, name):
        faccel.save(state_of(ctx, tied=tied), tmp_path / name, ctx, step=1)

    def load(ctx, name):
        faccel.load(state_of(ctx, tied=True), tmp_path / name, ctx)

    simulate(save, 1, True, "tied")
    simulate(save, 1, False, "untied")
    for world_size, mesh in ((1, None), (2, "pp=2")):
        simulate(load, world_size, "tied", mesh=mesh)
        with pytest.raises(CheckpointError, match=r"last\.weight` only in the checkpoint"):
            simulate(load, world_size, "untied", mesh=mesh)
