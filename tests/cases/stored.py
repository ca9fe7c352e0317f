"""Files: what is saved can be loaded, under the user's names, or the save raises."""

import os

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import faccel
from faccel.errors import CheckpointError, ConfigError
from faccel.testing import fake_context
from tests.cases.worlds import WORLDS, full
from tests.world import test_compiled_names as names
from tests.world import test_partial_load as partial

ONE = fake_context(0, 1)

# compiled_before_wrap


FORM_OF = {form.__name__: form for form in names.FORMS}


def a_model_compiled_before_wrap(folder, world, saved):
    """Its names are those of the user's module; every form loads it, on every mesh."""
    expected = WORLDS[world].run(names.save, FORM_OF[saved], folder)[0]
    assert set(load_file(folder / "export" / "model.safetensors")) == names.NAMES
    for number, form in enumerate(names.FORMS):
        loading = WORLDS[("ddp", "fsdp-root")[number // 2]]
        for loaded in loading.run(names.load, form, folder):
            torch.testing.assert_close(loaded, expected, rtol=0, atol=0)


# compiled_export


CLASSES = {
    "llama": "AutoModelForCausalLM",
    "gpt2": "AutoModelForCausalLM",
    "bert": "AutoModelForSequenceClassification",
}


def export_compiled(ctx, name, form, folder):
    from tests.hf.models import build

    net = build(name)
    expected = net.state_dict()
    if form == "whole":
        compiled = torch.compile(net, backend="eager")
    else:
        compiled = net
        child = net.get_submodule(net.base_model_prefix)
        setattr(net, net.base_model_prefix, torch.compile(child, backend="eager"))
    model = faccel.wrap(compiled, ctx)
    faccel.checkpoint.export_model(model, folder, ctx)
    return {key.replace("_orig_mod.", ""): value for key, value in expected.items()}


def an_export_for_from_pretrained(folder, world, name, form):
    """`from_pretrained` reads the export of a compiled model, bit for bit."""
    hf = pytest.importorskip("transformers")
    expected = WORLDS[world].run(export_compiled, name, form, str(folder))[0]
    loaded = getattr(hf, CLASSES[name]).from_pretrained(folder).state_dict()
    assert loaded.keys() == expected.keys()
    if world == "single":
        torch.testing.assert_close(dict(loaded), expected, rtol=0, atol=0)


# complex_ckpt


COMPLEX = {"complex64": torch.complex64, "complex128": torch.complex128}


class Fourier(nn.Module):
    def __init__(self, dtype, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.spectrum = nn.Parameter(torch.randn(4, 4, dtype=dtype, generator=generator))

    def forward(self, x):
        return (x.to(self.spectrum.dtype) @ self.spectrum).abs()


def save_complex(ctx, dtype, folder):
    model = faccel.wrap(Fourier(COMPLEX[dtype], 0), ctx)
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    opt = faccel.wrap_optimizer(opt, model, ctx)
    loss = model(torch.ones(2, 4)).sum()
    scaler = faccel.scaled_backward(loss, faccel.init_scaler(ctx), ctx)
    faccel.optimizer_step(opt, scaler, ctx)
    faccel.save({"model": model, "opt": opt}, folder, ctx, step=1)


def load_complex(ctx, dtype, folder):
    model = faccel.wrap(Fourier(COMPLEX[dtype], 1), ctx)
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    opt = faccel.wrap_optimizer(opt, model, ctx)
    faccel.load({"model": model, "opt": opt}, folder, ctx)
    (entry,) = opt.state.values()
    return full(model.spectrum), full(entry["momentum_buffer"])


def a_complex_parameter(folder, saved, loaded, dtype):
    """A parameter and its momentum are those of one update of plain torch."""
    net = Fourier(COMPLEX[dtype], 0)
    opt = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    net(torch.ones(2, 4)).sum().backward()
    opt.step()
    (entry,) = opt.state.values()
    WORLDS[saved].run(save_complex, dtype, str(folder))
    for spectrum, momentum in WORLDS[loaded].run(load_complex, dtype, str(folder)):
        torch.testing.assert_close(spectrum, net.spectrum.detach())
        torch.testing.assert_close(momentum, entry["momentum_buffer"])


# half_loaded


LATER = {
    "another shape": lambda: partial.net(3),
    "a layer more": lambda: partial.net(extra=True),
    "another name": lambda: partial.net(name="backbone"),
    "another class": dict,
}


def load_what_does_not_fit(ctx, later, folder):
    first = faccel.wrap(partial.net(), ctx)
    faccel.save({"a": first, "b": partial.net()}, folder, ctx, step=1)
    with torch.no_grad():
        first.module["body"].weight.fill_(7.0)
    with pytest.raises(CheckpointError, match="does not fit"):
        faccel.load({"a": first, "b": LATER[later]()}, folder, ctx)
    return full(first.module["body"].weight).unique().tolist()


def a_load_that_fails(folder, world, later):
    """The models before the one that does not fit are unchanged."""
    ranks = WORLDS[world].run(load_what_does_not_fit, later, str(folder))
    assert ranks == [[7.0]] * WORLDS[world].size


def load_both(ctx, folder):
    first = faccel.wrap(nn.Linear(2, 2), ctx)
    second = faccel.wrap(Fourier(torch.complex64, 0), ctx)
    before = full(first.weight)
    faccel.save({"a": first, "b": second}, folder, ctx, step=1)
    with torch.no_grad():
        first.module.weight.fill_(7.0)
        second.module.spectrum.fill_(7.0)
    faccel.load({"a": first, "b": second}, folder, ctx)
    return torch.equal(full(first.weight), before), full(second.spectrum)


def a_load_of_a_complex_model(folder, world):
    """Both models are loaded."""
    expected = Fourier(torch.complex64, 0).spectrum
    for is_equal, spectrum in WORLDS[world].run(load_both, str(folder)):
        assert is_equal
        assert torch.equal(spectrum, expected)


# lowbit_state


def make_lowbit(ctx, name):
    import torchao.optim

    torch.manual_seed(0)
    model = faccel.wrap(nn.Linear(128, 128), ctx)
    opt = getattr(torchao.optim, name)(model.parameters())
    return {"model": model, "opt": faccel.wrap_optimizer(opt, model, ctx)}


def step_lowbit(state, ctx, seed):
    x = torch.randn(4, 128, generator=torch.Generator().manual_seed(seed))
    loss = state["model"](x).square().sum()
    scaler = faccel.scaled_backward(loss, faccel.init_scaler(ctx), ctx)
    faccel.optimizer_step(state["opt"], scaler, ctx)


def resume_lowbit(ctx, name, folder):
    state, other = make_lowbit(ctx, name), make_lowbit(ctx, name)
    step_lowbit(state, ctx, 0)
    faccel.save(state, folder, ctx, step=1)
    faccel.load(other, folder, ctx)
    for run in (state, other):
        step_lowbit(run, ctx, 1)
    return [
        {name: full(value) for name, value in run["model"].state_dict().items()}
        for run in (state, other)
    ]


def a_low_bit_optimizer(folder, world, name):
    """A resumed run is the run that was not interrupted."""
    pytest.importorskip("torchao", reason="torchao is not installed")
    with torch.compiler.set_stance("force_eager"):  # of the process, so outside of the ranks
        results = WORLDS[world].run(resume_lowbit, name, str(folder))
    for expected, resumed in results:
        torch.testing.assert_close(resumed, expected, rtol=0, atol=0)


# partial_load


# What is loaded, and what the report names.
INTO = {
    "other head": (
        lambda: {"model": partial.net(3, seed=1)},
        {"mismatched": ("model.head.bias", "model.head.weight")},
    ),
    "a layer more": (
        lambda: {"model": partial.net(extra=True, seed=1)},
        {"missing": ("model.extra.bias", "model.extra.weight")},
    ),
    "renamed": (
        lambda: {"model": partial.net(name="backbone", seed=1)},
        {},
    ),
    "a key the old run had not": (
        lambda: {"model": partial.net(seed=1), "step": 0, "ema_step": 5},
        {"missing": ("ema_step",)},
    ),
}


def load_in_part(ctx, name, folder):
    state = INTO[name][0]()
    module = state["model"]
    state["model"] = faccel.wrap(module, ctx)
    rename = {"model.body": "model.backbone"} if name == "renamed" else None
    loaded, report = faccel.load(state, folder, ctx, strict=False, rename=rename)
    fields = {field: getattr(report, field) for field in ("missing", "unexpected", "mismatched")}
    layer = module["backbone" if name == "renamed" else "body"]
    return {key: names for key, names in fields.items() if names}, full(layer.weight), loaded


def a_part_of_a_checkpoint(folder, world, name):
    """What fits is loaded, the report names all else, and `strict` refuses it."""
    faccel.save({"model": partial.net(), "step": 4}, folder, ONE, step=1)
    for fields, weight, loaded in WORLDS[world].run(load_in_part, name, str(folder)):
        assert fields == INTO[name][1]
        assert torch.equal(weight, partial.net()["body"].weight)
        assert (loaded.get("step", 4), loaded.get("ema_step", 5)) == (4, 5)
    with pytest.raises(CheckpointError, match="does not fit"):
        faccel.load(INTO[name][0](), folder, ONE)


def tensors_without_a_model(folder, world):
    """The tensors of a model are read without the model, whatever the mesh that saved them."""
    WORLDS[world].run(save_wrapped, str(folder))
    raw = faccel.load({"model": None, "step": 0}, folder, ONE)
    assert raw["step"] == 4
    expected = dict(partial.net().state_dict())
    torch.testing.assert_close(raw["model"], expected, rtol=0, atol=0)
    everything = faccel.load(None, folder, ONE)
    torch.testing.assert_close(everything["model"], expected, rtol=0, atol=0)


def save_wrapped(ctx, folder):
    faccel.save({"model": faccel.wrap(partial.net(), ctx), "step": 4}, folder, ctx, step=1)


# remote_path


USES = {
    "save": lambda url: faccel.save({"step": 1}, url, ONE, step=1),
    "load": lambda url: faccel.load({"step": 1}, url, ONE),
    "latest": lambda url: faccel.latest(url, ONE),
    "checkpoints": lambda url: faccel.checkpoint.checkpoints(url),
    "export_model": lambda url: faccel.checkpoint.export_model(nn.Linear(2, 1), url, ONE),
    "load_model": lambda url: faccel.checkpoint.load_model(nn.Linear(2, 1), url, ONE),
    "run_dir": lambda url: faccel.init(env={}, run_dir=url),
}


def a_url_for_a_path(folder, use, url):
    """It raises, and no folder of that name is made."""
    before = os.listdir(".")
    with pytest.raises(ConfigError, match="not a URL") as caught:
        USES[use](url)
    assert url in caught.value.got
    assert os.listdir(".") == before
