"""A model that is compiled before `wrap` is stored under the user's names, as an uncompiled one."""

import attrs
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import nn

import faccel
from faccel.checkpoint.manifest import MANIFEST, read_manifest
from faccel.cli.commands import main
from faccel.errors import CheckpointError, ModelError
from faccel.testing import fake_context

ONE = fake_context(0, 1)


class Net(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.norm, self.last = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)

    def forward(self, x):
        return self.last(self.norm(self.first(x)))


def compiled(module):
    return torch.compile(module, backend="eager")


def plain(net):
    return net


def part(net):
    net.first = compiled(net.first)
    return net


def nested(net):
    return compiled(part(net))


NAMES = set(Net().state_dict())
FORMS = (plain, compiled, part, nested)


def make(ctx, form, seed):
    model = faccel.wrap(form(Net(seed)), ctx)
    opt = faccel.wrap_optimizer(torch.optim.AdamW(model.parameters(), lr=0.1), model, ctx)
    return {"model": model, "opt": opt}


def step(state):
    for number, param in enumerate(state["model"].parameters()):
        param.grad = torch.full_like(param, float(number))
    state["opt"].step()


def values(state):
    """Return parameters and buffers, in the order of the module, and moments of the optimizer."""
    tensors = list(state["model"].state_dict().values())
    for entry in state["opt"].state_dict()["state"].values():
        tensors += entry.values()
    return [getattr(x, "full_tensor", lambda x=x: x)().detach().clone() for x in tensors]


def save(ctx, form, path):
    state = make(ctx, form, 0)
    step(state)  # without a forward, which would be compiled: only the names matter
    faccel.save(state, path / "runs", ctx, step=1)
    faccel.checkpoint.export_model(state["model"], path / "export", ctx)
    return values(state)


def load(ctx, form, path):
    state = make(ctx, form, 1)
    faccel.load(state, path / "runs", ctx)
    loaded = values(state)
    other = make(ctx, form, 2)
    faccel.checkpoint.load_model(other["model"], path / "export", ctx)
    same = zip(state["model"].parameters(), other["model"].parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in same)
    return loaded


def test_without_frozen_parameters_a_compiled_model_has_the_same_names(tmp_path):
    net = Net()
    net.first.requires_grad_(requires_grad=False)
    trained = {name for name in NAMES if not name.startswith("first")}
    model = compiled(net)
    faccel.checkpoint.export_model(model, tmp_path, ONE, trained_only=True)
    assert set(load_file(tmp_path / "model.safetensors")) == trained
    faccel.save({"m": model}, tmp_path, ONE, step=1, trained_only=True)
    other = Net(1)
    other.first.requires_grad_(requires_grad=False)
    before = other.first.weight.clone()
    faccel.load({"m": other}, tmp_path, ONE)
    assert torch.equal(other.last.weight, net.last.weight)
    assert torch.equal(other.first.weight, before)


class Versioned(nn.Linear):
    """A module that multiplies what its first version wrote."""

    _version = 2

    def _load_from_state_dict(self, state, prefix, local_metadata, *args):
        if local_metadata.get("version", 1) < 2:
            state[f"{prefix}weight"] = state[f"{prefix}weight"] * 10
        super()._load_from_state_dict(state, prefix, local_metadata, *args)


@pytest.mark.parametrize("forms", [(plain, compiled), (compiled, plain), (compiled, compiled)])
def test_a_compiled_module_gets_the_version_that_saved_its_state(tmp_path, forms):
    first, second = (form(nn.Sequential(Versioned(1, 1))) for form in forms)
    faccel.save({"net": first}, tmp_path, ONE, step=1)
    faccel.load({"net": second}, tmp_path, ONE)
    assert torch.equal(next(first.parameters()), next(second.parameters()))


def old_checkpoint(path):
    """Write a checkpoint with the names of a compiled module, as versions before this one did."""
    net = nn.Linear(2, 1)
    moments = {"weight": {"momentum_buffer": torch.full((1, 2), 5.0)}, "bias": {}}
    options = {"lr": 0.5, "params": ["m/_orig_mod.weight", "m/_orig_mod.bias"]}
    options = torch.optim.SGD(net.parameters(), lr=1.0).state_dict()["param_groups"][0] | options
    state = {
        "m": {f"_orig_mod.{name}": value for name, value in net.state_dict().items()},
        "o": {
            "state": {f"m/_orig_mod.{name}": value for name, value in moments.items()},
            "param_groups": [options],
            "rest": {},
        },
    }
    folder = faccel.save(state, path, ONE, step=1).path
    manifest = read_manifest(folder)
    node = {
        "m": {"!": "module", "v": manifest.state["m"], "versions": {"_orig_mod": 1}},
        "o": {"!": "optimizer", "v": manifest.state["o"]},
    }
    with open(f"{folder}/{MANIFEST}", "wb") as file:
        file.write(attrs.evolve(manifest, state=node).to_bytes())
    return net


@pytest.mark.parametrize("form", [plain, compiled])
def test_older_files_with_the_names_of_a_compiled_model_are_read(tmp_path, form):
    net = old_checkpoint(tmp_path / "runs")
    loaded = form(nn.Linear(2, 1))
    opt = torch.optim.SGD(loaded.parameters(), lr=1.0, momentum=0.9)
    faccel.load({"m": loaded, "o": opt}, tmp_path / "runs", ONE)
    assert all(
        torch.equal(a, b) for a, b in zip(net.parameters(), loaded.parameters(), strict=True)
    )
    assert opt.state[next(loaded.parameters())]["momentum_buffer"].tolist() == [[5, 5]]
    assert opt.param_groups[0]["lr"] == 0.5
    out = CliRunner().invoke(main, ["merge", str(tmp_path / "runs"), str(tmp_path / "out")])
    assert out.exit_code == 0, out.output
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == {"weight", "bias"}
    file = tmp_path / "x.safetensors"
    save_file({f"_orig_mod.{name}": x for name, x in net.state_dict().items()}, file)
    other = form(nn.Linear(2, 1))
    faccel.checkpoint.load_model(other, file, ONE)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


def test_two_tensors_of_one_name_raise(tmp_path):
    net = nn.Module()
    net.weight = nn.Parameter(torch.ones(1))
    net._orig_mod = nn.ParameterDict({"weight": torch.ones(1)})
    for call in (
        lambda: faccel.save({"net": net}, tmp_path, ONE, step=1),
        lambda: faccel.checkpoint.export_model(net, tmp_path, ONE),
    ):
        with pytest.raises((CheckpointError, ModelError), match="have the name `weight`"):
            call()
