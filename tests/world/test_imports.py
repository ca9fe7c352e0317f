"""Checkpoints of other programs: what a folder holds is loaded exactly, and no code is executed."""

import json
import os
import pickle
import random
import warnings
from contextlib import suppress

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from click.testing import CliRunner
from safetensors.torch import save_file
from torch import nn

import faccel
from faccel.cli.commands import main
from faccel.errors import CheckpointError, ConfigError
from faccel.testing import fake_context, simulate

ONE = fake_context(0, 1)
TWO_SHARDS = faccel.MeshSpec(dp_shard=2)


class Code:
    """Executes code when a program unpickles it."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def trained(seed=0):
    """Return a module and its optimizer after two updates in plain torch."""
    model = net(seed)
    opt = torch.optim.AdamW(model.parameters(), lr=0.1)
    for x in torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(3)):
        model(x).square().mean().backward()
        opt.step()
        opt.zero_grad()
    return model, opt


def random_states(seed):
    """Return what Accelerate stores about the generators."""
    return {
        "step": 2,
        "random_state": random.Random(seed).getstate(),
        "numpy_random_seed": np.random.RandomState(seed).get_state(),
        "torch_manual_seed": torch.Generator().manual_seed(seed).get_state(),
    }


def write_accelerate(folder, *, num_ranks=1, prefix=""):
    """Write the files that `save_state` of Accelerate writes."""
    folder.mkdir()
    model, opt = trained()
    tensors = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    torch.save(opt.state_dict(), folder / "optimizer.bin")
    schedule = torch.optim.lr_scheduler.StepLR(opt, 3)
    torch.save(schedule.state_dict(), folder / "scheduler.bin")
    scaler = torch.amp.GradScaler("cpu", init_scale=512.0, growth_interval=7)
    torch.save(scaler.state_dict() | {"_growth_tracker": 5}, folder / "scaler.pt")
    for rank in range(num_ranks):
        torch.save(random_states(rank), folder / f"random_states_{rank}.pkl")
    torch.save({"best": 0.5}, folder / "custom_checkpoint_0.pkl")
    return model, opt


def save_dcp(state, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that this is one process
        dcp.save(state, checkpoint_id=folder, no_dist=True)


def write_dcp(folder, model, opt):
    save_dcp({"model": model.state_dict(), "optimizer": opt.state_dict(), "epoch": 4}, folder)


def write_torch(folder, model, opt):
    folder.mkdir()
    state = {"model": model.state_dict(), "optimizer": opt.state_dict(), "epoch": 4}
    torch.save(state, folder / "last.ckpt")
    return folder / "last.ckpt"


FORMATS = {
    "accelerate": lambda folder, model, opt: write_accelerate(folder) and folder,
    "dcp": lambda folder, model, opt: write_dcp(folder, model, opt) or folder,
    "torch": write_torch,
}


def run(*arguments):
    result = CliRunner().invoke(main, ["checkpoints", "import", *map(str, arguments)])
    return result.exit_code, result.output


def fresh(ctx, plan=None):
    model = faccel.wrap(net(seed=9), ctx, plan=plan)
    opt = torch.optim.AdamW(model.parameters(), lr=0.5)
    return {"model": model, "optimizer": faccel.wrap_optimizer(opt, model, ctx)}


def full_state(state, ctx):
    """Return full tensors of the model and of the optimizer's momentum."""
    tensors = dict(state["model"].state_dict())
    for index, entry in state["optimizer"].state_dict()["state"].items():
        tensors[f"exp_avg.{index}"] = entry["exp_avg"]
    full = {}
    for name, tensor in tensors.items():
        full[name] = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()
    return full


def expected_state():
    model, opt = trained()
    momentum = {f"exp_avg.{i}": e["exp_avg"] for i, e in opt.state_dict()["state"].items()}
    return {**model.state_dict(), **momentum}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("is_copied", [False, True])
@pytest.mark.parametrize("world_size", [1, 2])
def test_model_and_optimizer_are_those_of_the_run_in_any_layout(
    tmp_path, name, is_copied, world_size
):
    path = FORMATS[name](tmp_path / "theirs", *trained())
    options = {"format": "auto"}
    if is_copied:
        code, output = run(path, tmp_path / "ours")
        assert code == 0, output
        path, options = tmp_path / "ours", {}

    def load(ctx):
        state = fresh(ctx)
        faccel.load(state, path, ctx, **options)
        return full_state(state, ctx)

    strategy = {1: {}, 2: {"mesh": TWO_SHARDS}}[world_size]
    for full in simulate(load, world_size, **strategy):
        assert full.keys() == expected_state().keys()
        for key, tensor in expected_state().items():
            assert torch.equal(full[key], tensor), key


def test_values_of_accelerate_are_those_of_the_run(tmp_path):
    write_accelerate(tmp_path / "theirs", num_ranks=2)
    code, output = run(tmp_path / "theirs", tmp_path / "ours", "--epoch", 3, "--samples", 40)
    assert code == 0, output
    assert "Accelerate steps a scheduler 2 times per update" in output
    assert "its parameters have numbers" in output

    def load(ctx):
        state = fresh(ctx)
        schedule = torch.optim.lr_scheduler.StepLR(state["optimizer"], 5)
        state |= {"scheduler": schedule, "custom_0": None, "cursor": None, "step": None}
        state |= {"scaler": faccel.init_scaler(ctx), "rng": faccel.rng_state(ctx)}
        state = faccel.load(state, tmp_path / "ours", ctx)
        faccel.set_rng_state(state["rng"])
        draws = (torch.rand(()).item(), np.random.rand(), random.random())
        assert state["custom_0"] == {"best": 0.5}  # without its object, the values
        return state["scheduler"].step_size, state["cursor"], state["step"], state["scaler"], draws

    for rank, result in enumerate(simulate(load, 2)):
        step_size, cursor, step, scaler, draws = result
        assert (step_size, cursor, step) == (3, faccel.Cursor(3, 40), 2)
        assert (scaler.enabled, scaler.scale, scaler.growth_interval) == (True, 512.0, 7)
        assert scaler.num_good_steps == 5
        expected = torch.rand((), generator=torch.Generator().manual_seed(rank)).item()
        python = random.Random(rank).random()
        assert draws == (expected, np.random.RandomState(rank).rand(), python)


def test_names_of_ddp_lose_its_prefix_and_the_screen_shows_it(tmp_path):
    model, _ = write_accelerate(tmp_path / "theirs", prefix="module.")
    code, output = run(tmp_path / "theirs", tmp_path / "ours")
    assert code == 0
    assert "the prefix `module.` of DistributedDataParallel was removed" in output
    loaded = net(seed=9)
    faccel.load({"model": loaded}, tmp_path / "ours", ONE)
    assert all(map(torch.equal, loaded.parameters(), model.parameters()))
    # A model whose only child has this name.
    outer = nn.ModuleDict({"module": net(seed=9)})
    faccel.load({"model": outer}, tmp_path / "ours", ONE, rename={"model": "model.module"})
    assert all(map(torch.equal, outer.parameters(), model.parameters()))


@pytest.mark.parametrize("name", ["torch", "accelerate", "dcp"])
def test_names_in_the_optimizer_of_a_ddp_module_are_those_of_its_model(tmp_path, name):
    # As `DistributedDataParallel` names them in both.
    model = nn.ModuleDict({"module": net()})
    opt = torch.optim.AdamW(model.named_parameters(), lr=0.1)
    model["module"](torch.ones(2, 3)).sum().backward()
    opt.step()
    state, path = {"model": model.state_dict(), "optimizer": opt.state_dict()}, tmp_path / "run"
    if name == "torch":
        torch.save(state, path)
    elif name == "dcp":
        save_dcp(state, path)
    else:
        path.mkdir()
        save_file(state["model"], path / "model.safetensors")
        torch.save(state["optimizer"], path / "optimizer.bin")
    loaded = net(seed=9)
    # The names decide, not the order.
    loaded_opt = torch.optim.AdamW([*loaded.parameters()][::-1], lr=0.5)
    faccel.load({"model": loaded, "optimizer": loaded_opt}, path, ONE, format=name)
    for param, source in zip(loaded.parameters(), model.parameters(), strict=True):
        assert torch.equal(param, source)
        assert torch.equal(loaded_opt.state[param]["exp_avg"], opt.state[source]["exp_avg"])
    # A model whose only child has this name.
    outer = nn.ModuleDict({"module": net(seed=9)})
    outer_opt = torch.optim.AdamW([*outer.parameters()][::-1], lr=0.5)
    state = {"model": outer, "optimizer": outer_opt}
    faccel.load(state, path, ONE, format=name, rename={"model": "model.module"})
    for param, source in zip(outer.parameters(), model.parameters(), strict=True):
        assert torch.equal(outer_opt.state[param]["exp_avg"], opt.state[source]["exp_avg"])


def test_every_file_is_imported_or_listed_with_a_reason(tmp_path):
    folder = tmp_path / "theirs"
    write_accelerate(folder)
    for name in ("sampler.bin", "dl_state_dict.bin", "notes.txt", "pytorch_model.bin"):
        (folder / name).write_bytes(pickle.dumps(Code(str(tmp_path / "executed"))))
    code, output = run(folder, tmp_path / "ours", "--json", "--skip", "custom_checkpoint_0.pkl")
    assert code == 0, output
    report = json.loads(output)
    assert report["state"].keys() == {"model", "optimizer", "scheduler", "scaler", "rng", "step"}
    assert report["left_out"].keys() == {
        "sampler.bin", "dl_state_dict.bin", "notes.txt", "pytorch_model.bin", "cursor",
        "custom_checkpoint_0.pkl",
    }  # fmt: skip
    assert not (tmp_path / "executed").exists()


def imported(folder, out, *options):
    """Return the state and the reasons that `faccel checkpoints import` prints."""
    code, output = run(folder, out, "--json", *options)
    assert code == 0, output
    report = json.loads(output)
    return report["state"], report["left_out"]


def test_a_skipped_scaler_is_not_one_that_is_disabled(tmp_path):
    folder = tmp_path / "theirs"
    write_accelerate(folder)
    state, left_out = imported(folder, tmp_path / "ours", "--skip", "scaler.pt")
    assert "scaler" not in state
    assert left_out["scaler.pt"] == "skipped"
    # The scale of the run that loads it stays, instead of one without an effect.
    scaler = faccel.init_scaler(ONE)
    with pytest.raises(CheckpointError, match="scaler"):
        faccel.load({"model": net(), "scaler": scaler}, tmp_path / "ours", ONE)
    # A run without a scale writes no such file.
    (folder / "scaler.pt").unlink()
    state, _ = imported(folder, tmp_path / "bf16")
    assert "scaler" in state


@pytest.mark.parametrize("rank", range(3))
def test_the_generators_of_all_ranks_or_of_none_are_imported(tmp_path, rank):
    folder, names = tmp_path / "theirs", [f"random_states_{number}.pkl" for number in range(3)]
    write_accelerate(folder, num_ranks=3)
    state, left_out = imported(folder, tmp_path / "ours", "--skip", names[rank])
    assert "rng" not in state
    reasons = {name: reason for name, reason in left_out.items() if name.startswith("random")}
    others = dict.fromkeys(names, "the generators of another rank were skipped")
    assert reasons == others | {names[rank]: "skipped"}


def test_the_optimizer_of_sgd_without_momentum_is_imported(tmp_path):
    # Its `state` is empty, and DCP stores no empty dict.
    model = net()
    opt = torch.optim.SGD(model.parameters(), lr=0.25, weight_decay=0.5)
    save_dcp({"model": model.state_dict(), "optimizer": opt.state_dict()}, tmp_path / "dcp")
    # The folder of an optimizer that Accelerate writes with FSDP.
    (tmp_path / "fsdp").mkdir()
    save_dcp({"optimizer": opt.state_dict()}, tmp_path / "fsdp" / "optimizer_0")
    save_file(model.state_dict(), tmp_path / "fsdp" / "model.safetensors")
    for name, kind in (("dcp", "dcp"), ("fsdp", "accelerate")):
        run(tmp_path / name, tmp_path / f"{name}-copy", "--step", 7)
        for folder, options in ((name, {"format": kind}), (f"{name}-copy", {})):
            loaded = net(seed=9)
            other = torch.optim.SGD(loaded.parameters(), lr=1.0)
            faccel.load({"model": loaded, "optimizer": other}, tmp_path / folder, ONE, **options)
            assert all(map(torch.equal, loaded.parameters(), model.parameters()))
            assert other.param_groups[0]["lr"] == 0.25
            assert other.param_groups[0]["weight_decay"] == 0.5


def test_other_keys_are_an_error_that_lists_those_of_the_folder(tmp_path):
    expected, _ = write_accelerate(tmp_path / "theirs")
    loaded = net(seed=9)
    with pytest.raises(CheckpointError) as caught:
        faccel.load({"net": loaded}, tmp_path / "theirs", ONE, format="accelerate")
    assert caught.value.got == "net"
    for key in ("model", "optimizer", "scheduler", "scaler", "rng", "custom_0"):
        assert key in caught.value.fix
    assert 'rename={"model": "net"}' in caught.value.fix
    names = {"model": "net"}
    path = tmp_path / "theirs"
    faccel.load({"net": loaded}, path, ONE, format="accelerate", rename=names)
    assert all(map(torch.equal, loaded.parameters(), expected.parameters()))


FILES_OF_CODE = [
    "optimizer.bin", "scheduler.bin", "scaler.pt", "random_states_0.pkl", "custom_checkpoint_0.pkl",
    "pytorch_model_1.bin",
]  # fmt: skip


@pytest.mark.parametrize("writer", ["torch", "pickle"])
@pytest.mark.parametrize("name", FILES_OF_CODE)
def test_a_file_with_code_is_refused_by_name_and_nothing_runs(tmp_path, name, writer):
    folder, marker = tmp_path / "theirs", tmp_path / "executed"
    write_accelerate(folder)
    content = {"state": {}, "param_groups": [], "x": Code(str(marker))}
    if writer == "torch":
        torch.save(content, folder / name)
    else:
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    code, output = run(folder, tmp_path / "ours")
    assert code == 1
    assert f"`{name}`" in output
    assert not (tmp_path / "ours").exists()
    with pytest.raises(CheckpointError, match=f"`{name}`"):
        faccel.load(dict.fromkeys(ALL_KEYS), folder, ONE, format="accelerate")
    assert not marker.exists()
    code, output = run(folder, tmp_path / "ours", "--skip", name)
    assert code == 0, output
    assert not marker.exists()


ALL_KEYS = ["model", "model_1", "optimizer", "scheduler", "scaler", "rng", "custom_0"]


def test_code_in_a_folder_of_dcp_is_refused_and_does_not_run(tmp_path):
    marker = tmp_path / "executed"
    for number, content in enumerate(
        [{"x": torch.ones(2), "y": Code(str(marker))}, {"x": torch.ones(2), "y": 3}]
    ):
        save_dcp(content, tmp_path / str(number))
    (tmp_path / "1" / ".metadata").write_bytes(pickle.dumps(Code(str(marker))))
    for number in (0, 1):
        with pytest.raises(CheckpointError, match="contains pickled code, which is not executed"):
            faccel.load({"x": None, "y": None}, tmp_path / str(number), ONE, format="dcp")
    assert not marker.exists()


def test_a_description_of_dcp_cannot_read_files_elsewhere(tmp_path):
    save_dcp({"x": torch.ones(2)}, tmp_path / "run")
    metadata = tmp_path / "run" / ".metadata"
    data = metadata.read_bytes()
    metadata.write_bytes(data.replace(b"__0_0.distcp", b"../x..distcp"))
    with pytest.raises(CheckpointError, match="outside of the folder"):
        faccel.load({"x": None}, tmp_path / "run", ONE, format="dcp")
    # The class of the description keeps its methods.
    assert type(dcp.FileSystemReader(tmp_path / "run").read_metadata()).__module__.startswith(
        "torch"
    )


def test_a_sharded_folder_of_dcp_is_read_completely(tmp_path):
    def write(ctx):
        state = fresh(ctx)
        dcp.save({"model": state["model"].state_dict()}, checkpoint_id=tmp_path / "run")
        return full_state(state, ctx)

    written = simulate(write, 2, mesh=TWO_SHARDS)[0]
    loaded = net(seed=5)
    faccel.load({"model": loaded}, tmp_path / "run", ONE, format="dcp")
    assert all(torch.equal(tensor, written[key]) for key, tensor in loaded.state_dict().items())
    (tmp_path / "run" / "__1_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"`__1_0\.distcp` is missing"):
        faccel.load({"model": loaded}, tmp_path / "run", ONE, format="dcp")


@pytest.mark.parametrize("kind", ["one", "index", "bin", "bin index"])
def test_weights_of_hugging_face_are_read(tmp_path, kind):
    tensors = net(seed=4).state_dict()
    names = sorted(tensors)
    files = {"part-1": names[:2], "part-2": names[2:]}
    suffix, index = {"one": ("safetensors", None), "bin": ("bin", None)}.get(
        kind, ("safetensors" if kind == "index" else "bin", True)
    )
    write = save_file if suffix == "safetensors" else torch.save
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    if index is None:
        write(tensors, tmp_path / f"{stem}.{suffix}")
    else:
        weight_map = {}
        for file, keys in files.items():
            write({key: tensors[key] for key in keys}, tmp_path / f"{file}.{suffix}")
            weight_map |= dict.fromkeys(keys, f"{file}.{suffix}")
        text = json.dumps({"weight_map": weight_map})
        (tmp_path / f"{stem}.{suffix}.index.json").write_text(text)
    (tmp_path / "config.json").write_text("{}")
    code, output = run(tmp_path, tmp_path / "ours")
    assert code == 0, output
    assert "config.json  LEFT OUT" in output
    model = net(seed=9)
    faccel.load({"model": model}, tmp_path / "ours", ONE)
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in model.state_dict().items())


def test_a_tied_tensor_that_the_file_has_once_is_loaded(tmp_path):
    def tied():
        model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
        model["b"].weight = model["a"].weight
        return model

    expected, model = tied(), tied()
    for name in ("a.weight", "b.weight"):  # a file has one of the names
        tensors = {key: value.clone() for key, value in expected.state_dict().items()}
        del tensors[name]
        save_file(tensors, tmp_path / "model.safetensors")
        model = tied()
        faccel.load({"model": model}, tmp_path, ONE, format="safetensors")
        assert all(map(torch.equal, model.parameters(), expected.parameters()))
        untied = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
        with pytest.raises(CheckpointError, match=f"`{name}` only in the state"):
            faccel.load({"model": untied}, tmp_path, ONE, format="safetensors")


def test_an_optimizer_with_its_parameters_in_another_order_raises(tmp_path):
    write_accelerate(tmp_path / "theirs")
    model = net(seed=9)
    opt = torch.optim.AdamW([*model.parameters()][::-1])
    with pytest.raises(CheckpointError, match="a momentum of shape"):
        faccel.load({"model": model, "optimizer": opt}, tmp_path / "theirs", ONE, format="auto")
    assert opt.state_dict()["state"] == {}


def test_an_optimizer_with_names_is_loaded_in_any_order(tmp_path):
    model, _ = trained()
    opt = torch.optim.SGD(model.named_parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(2, 3)).sum().backward()
    opt.step()
    torch.save({"net": model.state_dict(), "opt": opt.state_dict()}, tmp_path / "run.pt")
    other = net(seed=9)
    reversed_opt = torch.optim.SGD([*other.parameters()][::-1], lr=0.3, momentum=0.1)
    state = {"net": other, "opt": reversed_opt}
    faccel.load(state, tmp_path / "run.pt", ONE, format="torch")
    expected = [opt.state[param]["momentum_buffer"] for param in model.parameters()]
    got = [reversed_opt.state[param]["momentum_buffer"] for param in other.parameters()]
    assert all(map(torch.equal, got, expected))


BAD_ARGUMENTS = {
    "format": (dict(format="acelerate"), ConfigError, "accelerate"),
    "step": (dict(format="auto", step=3), ConfigError, "`step` selects one of faccel's"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_an_argument_that_does_not_fit_is_an_error(tmp_path, name):
    arguments, cls, text = BAD_ARGUMENTS[name]
    with pytest.raises(cls, match=text):
        faccel.load({"model": None}, tmp_path, ONE, **arguments)


FOLDERS = {
    "missing": ("nowhere", "`path` does not exist"),
    "empty": ("empty", "has no checkpoint that faccel reads"),
    "faccel's": ("own", "has checkpoints of faccel"),
    "a text": ("text.bin", "cannot be read"),
    "a pipe": ("pipe", "no regular file"),
    "a list": ("list.pt", "the file contains no dict"),
    "no optimizer": ("half", "`optimizer.bin` cannot be read"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_what_is_no_checkpoint_is_named(tmp_path, name):
    (tmp_path / "empty").mkdir()
    faccel.save({"x": 1}, tmp_path / "own", ONE, step=1)
    (tmp_path / "text.bin").write_text("text")
    os.mkfifo(tmp_path / "pipe")
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "half").mkdir()
    torch.save({"lr": 1}, tmp_path / "half" / "optimizer.bin")
    path, text = FOLDERS[name]
    with pytest.raises(CheckpointError, match=text):
        faccel.load({"model": None, "optimizer": None}, tmp_path / path, ONE, format="auto")


@pytest.mark.parametrize("name", ["accelerate", "dcp"])
def test_a_file_is_no_folder_of_a_format(tmp_path, name):
    torch.save({"model": net().state_dict()}, tmp_path / "run.pt")
    with pytest.raises(CheckpointError, match=f"`{name}` is a format of folders"):
        faccel.load({"model": net()}, tmp_path / "run.pt", ONE, format=name)
    code, output = run(tmp_path / "run.pt", tmp_path / "ours", "--format", name)
    assert code == 1
    assert "is a format of folders" in output


@pytest.mark.parametrize("name", ["pytorch_model_fsdp_0", "optimizer_0"])
def test_a_folder_of_fsdp_without_its_part_is_named(tmp_path, name):
    folder = tmp_path / "theirs"
    write_accelerate(folder)
    (folder / "model.safetensors").unlink()
    (folder / "optimizer.bin").unlink()
    save_dcp({"other": {"weight": torch.ones(2)}}, folder / name)
    state = {"model": net(), "optimizer": None}
    with pytest.raises(CheckpointError, match=f"`{name}` cannot be read"):
        faccel.load(state, folder, ONE, format="accelerate")


GROUP = {"lr": 0.1, "params": [0]}
ODD_OPTIMIZERS = {
    "a number as state": {"state": 3, "param_groups": [GROUP]},
    "a dict as groups": {"state": {}, "param_groups": {"lr": 0.1}},
    "a number as group": {"state": {}, "param_groups": [3]},
    "no parameters": {"state": {}, "param_groups": [{"lr": 0.1}]},
    "a number as parameters": {"state": {}, "param_groups": [GROUP | {"params": 3}]},
    "more names": {"state": {}, "param_groups": [GROUP | {"param_names": ["a", "b"]}]},
    "a number as names": {"state": {}, "param_groups": [GROUP | {"param_names": 3}]},
    "a list": [1, 2],
}


@pytest.mark.parametrize("kind", ODD_OPTIMIZERS)
def test_a_dict_that_is_no_state_of_an_optimizer_is_named(tmp_path, kind):
    write_accelerate(tmp_path / "theirs")
    torch.save(ODD_OPTIMIZERS[kind], tmp_path / "theirs" / "optimizer.bin")
    opt = torch.optim.SGD([torch.ones(1)], lr=0.1)
    with pytest.raises(CheckpointError, match=r"`optimizer\.bin` cannot be read"):
        faccel.load({"optimizer": opt}, tmp_path / "theirs", ONE, format="accelerate")
    # In one file it may be a dict of the user, which is no optimizer's.
    torch.save({"optimizer": ODD_OPTIMIZERS[kind]}, tmp_path / "run.pt")
    with pytest.raises(CheckpointError, match="optimizer"):
        faccel.load({"optimizer": opt}, tmp_path / "run.pt", ONE, format="torch")
    code, output = run(tmp_path / "run.pt", tmp_path / "ours")
    assert code == 0, output


@pytest.mark.parametrize("value", [float("nan"), float("inf"), torch.tensor(float("nan"))])
def test_a_step_that_is_no_number_counts_no_updates(tmp_path, value):
    state = {"state": {0: {"step": value}}, "param_groups": [GROUP]}
    torch.save({"optimizer": state}, tmp_path / "epoch_12")
    code, output = run(tmp_path / "epoch_12", tmp_path / "ours")
    assert code == 0, output
    assert faccel.latest(tmp_path / "ours", ONE).step == 12  # of the name


# Sizes in the description of a folder that exceed every memory.
HUGE = {
    "tensor": "2 of 562949953421312 elements",
    "file": r"`__0_0\.distcp` is shorter than described",
}


@pytest.mark.parametrize("kind", HUGE)
def test_a_size_of_dcp_is_checked_before_memory_is_allocated(tmp_path, kind):
    save_dcp({"x": torch.ones(2)}, tmp_path)
    metadata = dcp.FileSystemReader(tmp_path).read_metadata()
    if kind == "tensor":
        metadata.state_dict_metadata["x"].size = torch.Size([1 << 49])
    else:
        for location in metadata.storage_data.values():
            location.length = 1 << 49
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=HUGE[kind]):
        faccel.load({"x": None}, tmp_path, ONE, format="dcp")


@pytest.mark.parametrize("values", [{"epoch": 4}, [4]])
def test_a_folder_of_fabric_has_values_beside_its_shards(tmp_path, values):
    model, _ = trained()
    save_dcp({"model": model.state_dict()}, tmp_path)
    torch.save(values, tmp_path / "meta.pt")
    (tmp_path / "notes.txt").write_text("notes")
    loaded = net(seed=9)
    if isinstance(values, list):
        with pytest.raises(CheckpointError, match=r"`meta\.pt` cannot be read"):
            faccel.load({"model": loaded, "epoch": None}, tmp_path, ONE, format="auto")
        return
    state = faccel.load({"model": loaded, "epoch": None}, tmp_path, ONE, format="auto")
    assert state["epoch"] == 4
    assert all(map(torch.equal, loaded.parameters(), model.parameters()))
    assert imported(tmp_path, tmp_path / "ours")[1].keys() == {"notes.txt", "cursor"}


def test_an_unknown_name_to_skip_is_an_error(tmp_path):
    write_accelerate(tmp_path / "theirs")
    code, output = run(tmp_path / "theirs", tmp_path / "ours", "--skip", "optimizr.bin")
    assert code == 1
    assert "`skip` must name files of the folder" in output


@pytest.mark.parametrize("seed", range(20))
def test_a_corrupt_byte_is_an_error_or_changes_a_value(tmp_path, seed):
    write_dcp(tmp_path / "run", *trained())
    path = tmp_path / "run" / ".metadata"
    data = bytearray(path.read_bytes())
    data[random.Random(seed).randrange(len(data))] ^= 0x15
    path.write_bytes(data)
    with suppress(CheckpointError):
        faccel.load({"epoch": None}, tmp_path / "run", ONE, format="dcp")


def test_the_list_of_checkpoints_still_takes_a_directory(tmp_path):
    faccel.save({"x": 1}, tmp_path / "run", ONE, step=1)
    result = CliRunner().invoke(main, ["checkpoints", str(tmp_path / "run")])
    assert result.exit_code == 0
    assert result.output.startswith("step 1  ")
    output = CliRunner().invoke(main, ["checkpoints", "--help"]).output
    assert "checkpoints import [OPTIONS] DIRECTORY OUT" in output


def test_dicts_of_a_file_load_as_dicts_or_into_objects_at_any_depth(tmp_path):
    model, opt = trained()
    schedule = torch.optim.lr_scheduler.StepLR(opt, 3)
    inner = {"net": model.state_dict(), "opts": [opt.state_dict()], "note": {"a": 1}}
    torch.save({"run": inner, "schedule": schedule.state_dict(), "x": {}}, tmp_path / "run.pt")
    code, output = run(tmp_path / "run.pt", tmp_path / "ours")
    assert code == 0, output
    loaded, other = net(seed=9), torch.optim.lr_scheduler.StepLR(opt, 9)
    loaded_opt = torch.optim.AdamW(loaded.parameters())
    state = {"run": {"net": loaded, "opts": [loaded_opt], "note": {}}, "schedule": other, "x": {}}
    state = faccel.load(state, tmp_path / "ours", ONE)
    assert all(map(torch.equal, loaded.parameters(), model.parameters()))
    assert loaded_opt.state_dict()["state"][0]["step"] == 2
    assert (other.step_size, state["run"]["note"], state["x"]) == (3, {"a": 1}, {})
    # A state of faccel keeps its rule: an object loads what an object has saved.
    faccel.save({"schedule": {"step_size": 3}}, tmp_path / "plain", ONE, step=1)
    with pytest.raises(CheckpointError, match="does not fit"):
        faccel.load({"schedule": other}, tmp_path / "plain", ONE)


def test_the_error_of_a_corrupt_pickle_does_not_recommend_to_execute_it(tmp_path):
    (tmp_path / "pytorch_model.bin").write_text("x\n")
    with pytest.raises(CheckpointError, match=r"`pytorch_model\.bin` cannot be read") as caught:
        faccel.load({"model": net(seed=1)}, tmp_path, ONE, format="torch")
    assert caught.value.got == "no file of `torch.save`: Unsupported operand 120"
