"""Checkpoints in simulated worlds: a state loads on any world size, and a failure loses nothing."""

import dataclasses
import gc
import json
import logging
import os
import pathlib
import pickle
import shutil
import struct
import subprocess
import threading
import weakref
import zipfile
from collections import Counter, OrderedDict
from contextlib import suppress
from typing import NamedTuple

import attrs
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import faccel
from faccel.errors import CheckpointError, ConfigError, DesyncError
from faccel.testing import Fault, InjectedError, fake_context, simulate

ONE = fake_context(0, 1)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1)
        )

    def forward(self, x):
        return self.layers(x)


def make(ctx, seed=0, optimizer=torch.optim.AdamW):
    torch.manual_seed(seed)
    model = faccel.wrap(Net(), ctx)
    opt = faccel.wrap_optimizer(optimizer(model.parameters(), lr=0.01), model, ctx)
    faccel.seed_everything(seed, ctx, per_data_rank=True)
    return {
        "model": model,
        "opt": opt,
        "schedule": torch.optim.lr_scheduler.StepLR(opt, 2, gamma=0.5),
        "scaler": faccel.init_scaler(ctx),
        "rng": faccel.rng_state(ctx),
        "cursor": faccel.Cursor(),
        "step": 0,
    }


def loader(ctx):
    data = TensorDataset(torch.randn(50, 4, generator=faccel.random.generator(0)))
    return faccel.shard(DataLoader(data, 2, shuffle=True), ctx, tail="full")


def run(state, ctx, num_steps):
    """Train `num_steps` steps from a state; return the new state."""
    faccel.set_rng_state(state["rng"])
    scaler, step, opt = state["scaler"], state["step"], state["opt"]
    for _, batches in loader(ctx).epochs(100, start=state["cursor"]):
        for window in faccel.windows(batches, ctx, size=2):
            for micro in window:
                with faccel.grad_sync(state["model"], on=micro.sync):
                    loss = state["model"](micro.data[0]).square().mean()
                    scaler = faccel.scaled_backward(loss, scaler, ctx, scale=micro.scale)
            _, scaler = faccel.optimizer_step(opt, scaler, ctx, scheduler=state["schedule"])
            step += 1
            if step == state["step"] + num_steps:
                new = {
                    "scaler": scaler,
                    "cursor": window.cursor,
                    "rng": faccel.rng_state(ctx),
                    "step": step,
                }
                return state | new
    return None


def parameters(state):
    return {name: x.detach().clone() for name, x in state["model"].state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def resumes_equally(ctx, path, stop_after, background):
    uninterrupted = run(make(ctx), ctx, 6)
    first = run(make(ctx), ctx, stop_after)
    faccel.save(first, path, ctx, step=first["step"], background=background)
    resumed = faccel.load(make(ctx, seed=7), path, ctx)
    assert resumed["step"] == stop_after
    resumed = run(resumed, ctx, 6 - stop_after)
    return equal(parameters(resumed), parameters(uninterrupted))


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("config", [None, {"mixed_precision": "fp16"}], ids=["fp32", "fp16"])
def test_a_resumed_run_is_the_same_run(tmp_path, world_size, background, config):
    assert all(simulate(resumes_equally, world_size, str(tmp_path), 3, background, config=config))


def save_trained(path, world_size=2, num_steps=2, **options):
    def fn(ctx):
        state = run(make(ctx), ctx, num_steps)
        return faccel.save(state, path, ctx, step=state["step"], **options), parameters(state)

    return simulate(fn, world_size)[0]


def test_any_world_size_loads_the_checkpoint_of_another(tmp_path):
    _, expected = save_trained(tmp_path, 4)

    def fn(ctx):
        state = faccel.load(make(ctx, seed=3), tmp_path, ctx)
        draws = torch.rand(1, generator=None)
        faccel.set_rng_state(state["rng"])
        return parameters(state), state["cursor"], torch.rand(3), draws

    for world_size in (1, 2, 3, 6):
        ranks = simulate(fn, world_size)
        assert all(equal(rank[0], expected) for rank in ranks)
        assert len({rank[1] for rank in ranks}) == 1
        # each rank has different generators
        assert len({tuple(rank[2].tolist()) for rank in ranks}) == world_size


def test_random_states_of_each_rank_are_restored(tmp_path):
    import random

    def draw():
        return (
            torch.rand(2).tolist(),
            np.random.rand(2).tolist(),
            np.random.randn(1).tolist(),
            random.gauss(0, 1),
        )

    def fn(ctx):
        draw()
        faccel.save({"rng": faccel.rng_state(ctx)}, tmp_path, ctx, step=0)
        expected = draw()
        faccel.set_rng_state(faccel.load({"rng": None}, tmp_path, ctx)["rng"])
        return draw() == expected

    assert all(simulate(fn, 3))


class Pair(NamedTuple):
    a: int
    b: torch.Tensor


@attrs.frozen
class Record:
    name: str
    _hidden: float


class Counted:
    def __init__(self):
        self.count = 0

    def state_dict(self):
        return {"count": self.count, "x": torch.full((2,), float(self.count))}

    def load_state_dict(self, state):
        self.count = int(state["x"][0]) and state["count"]


VALUES = {
    "none": None,
    "bool": True,
    "int": 2**80,
    "float": 0.1,
    "infinite": -float("inf"),
    "text": 'é "quoted" \n',
    "bytes": b"\x00\xff",
    "complex": 1.5 - 2j,
    "tuple": (1, (2.5, "x"), []),
    "set": {1, 2},
    "frozenset": frozenset(["a"]),
    "numbered": {1: "a", (2, 3): "b", None: 4},
    "odd keys": {"a/b": 1, "a%2Fb": 2, "!": 3, "": 4},
    "counter": Counter("aab"),
    "ordered": OrderedDict(z=1, a=2),
    "dtype": torch.bfloat16,
    "device": torch.device("cpu"),
    "size": torch.Size([2, 3]),
    "scalar": np.float32(1.5),
    "array": np.arange(6).reshape(2, 3),
    "pair": Pair(1, torch.tensor(2.0)),
    "record": Record("x", 2.0),
    "cursor": faccel.Cursor(3, 96),
    "nothing": torch.empty(0, 3),
    "strided": torch.arange(6.0).view(2, 3).T,
}
DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16,
    torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint64, torch.uint32, torch.uint16, torch.uint8, torch.bool,
    torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip


def same(a, b):
    if isinstance(a, torch.Tensor):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        return (
            a.view(torch.uint8).equal(b.view(torch.uint8))
            if a.dtype.itemsize == 1
            else torch.equal(a, b)
        )
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, tuple) and hasattr(a, "_fields"):
        return all(map(same, a, b))
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("name", VALUES)
def test_values_of_every_kind_are_restored(tmp_path, name):
    value = VALUES[name]
    faccel.save({name: value, "more": [value]}, tmp_path, ONE, step=1)
    back = faccel.load({name: value, "more": [value]}, tmp_path, ONE)
    assert same(value, back[name]), back[name]
    assert same(value, back["more"][0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_of_every_dtype_are_restored(tmp_path, dtype):
    x = torch.tensor([[0, 1], [2, 3]]).to(dtype)
    faccel.save([x, x[0, 1]], tmp_path, ONE, step=1)
    a, b = faccel.load([x, None], tmp_path, ONE)
    assert same(x, a)
    assert same(x[0, 1], b)
    assert a.data_ptr() != x.data_ptr()


def test_objects_with_a_state_dict_are_updated_in_place(tmp_path):
    counted, module = Counted(), nn.Linear(2, 2)
    counted.count = 5
    state = {"c": counted, "m": module, "t": torch.ones(2)}
    before = module.weight.detach().clone()
    faccel.save(state, tmp_path, ONE, step=1)
    counted.count = 0
    module.weight.data.zero_()
    back = faccel.load(state, tmp_path, ONE)
    assert back["c"] is counted
    assert back["m"] is module
    assert back["t"] is not state["t"]
    assert counted.count == 5
    assert torch.equal(module.weight, before)


def test_tensordicts_are_restored(tmp_path):
    from tensordict import TensorDict

    x = TensorDict({"a": torch.ones(2, 3), "b": {"c": torch.zeros(2)}}, batch_size=[2])
    faccel.save({"x": x}, tmp_path, ONE, step=1)
    back = faccel.load({"x": None}, tmp_path, ONE)["x"]
    assert (back == x).all()
    assert back.batch_size == x.batch_size


OPTIMIZERS = [
    torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad,
    torch.optim.RMSprop, torch.optim.Adadelta, torch.optim.NAdam, torch.optim.Adafactor,
]  # fmt: skip


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: o.__name__)
def test_optimizers_resume_with_equal_updates(tmp_path, optimizer):
    state = run(make(ONE, optimizer=optimizer), ONE, 3)
    faccel.save(state, tmp_path, ONE, step=3)
    expected = parameters(run(state, ONE, 2))
    resumed = faccel.load(make(ONE, seed=5, optimizer=optimizer), tmp_path, ONE)
    assert equal(parameters(run(resumed, ONE, 2)), expected)


def test_an_optimizer_is_stored_by_the_names_of_its_parameters(tmp_path):
    """The loading program may have the groups, and the parameters in them, in another order."""

    def build(*, swapped):
        torch.manual_seed(0)
        model = faccel.wrap(nn.Linear(2, 1), ONE)
        groups = [{"params": [model.weight], "lr": 0.1}, {"params": [model.bias], "lr": 0.2}]
        opt = torch.optim.SGD(groups[::-1] if swapped else groups, momentum=0.9)
        faccel.scaled_backward(
            model(torch.ones(1, 2)).sum() * (3 if swapped else 1), faccel.init_scaler(ONE), ONE
        )
        opt.step()
        return {"model": model, "opt": opt}

    first = build(swapped=False)
    checkpoint = faccel.save(first, tmp_path, ONE, step=1)
    manifest = json.loads(
        pathlib.Path(checkpoint.path, "manifest.json").read_bytes().split(b"\n")[1]
    )
    assert set(manifest["state"]["opt"]["v"]["state"]) == {"model/weight", "model/bias"}
    momentum = [
        first["opt"].state[p]["momentum_buffer"].clone() for p in first["model"].parameters()
    ]
    second = build(swapped=True)
    faccel.load(second, tmp_path, ONE)
    for expected, p in zip(momentum, second["model"].parameters(), strict=True):
        assert torch.equal(second["opt"].state[p]["momentum_buffer"], expected)
    assert [group["lr"] for group in second["opt"].param_groups] == [0.2, 0.1]


def test_checkpoints_contain_no_pickled_data(tmp_path):
    checkpoint, _ = save_trained(tmp_path)
    for file in pathlib.Path(checkpoint.path).iterdir():
        data = file.read_bytes()
        assert not zipfile.is_zipfile(file)
        assert b"\x80\x02}" not in data[:100]
        assert file.suffix in (".safetensors", ".json")


class Malicious:
    def __reduce__(self):
        return os.system, ("touch /tmp/faccel-was-executed",)


def test_loading_executes_nothing_and_opens_no_unknown_file(tmp_path):
    checkpoint, _ = save_trained(tmp_path / "runs")
    folder = pathlib.Path(checkpoint.path)
    for name in (".metadata", "model.bin", "rank-00000.json", "x.pkl"):
        (folder / name).write_bytes(pickle.dumps(Malicious()))
    assert faccel.load(make(ONE), tmp_path / "runs", ONE)["step"] == 2
    assert not os.path.exists("/tmp/faccel-was-executed")
    (folder / "shard-00009.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    with pytest.raises(CheckpointError, match="does not belong"):
        faccel.load(make(ONE), tmp_path / "runs", ONE)


def test_a_manifest_that_names_files_outside_its_folder_is_invalid(tmp_path):
    from faccel.checkpoint.manifest import Manifest, read_manifest

    checkpoint, _ = save_trained(tmp_path)
    manifest = read_manifest(checkpoint.path)
    for name in ("../../etc/passwd", "/etc/passwd", "a/../b", ".."):
        files = (attrs.evolve(manifest.files[0], name=name),)
        pathlib.Path(checkpoint.path, "manifest.json").write_bytes(
            attrs.evolve(manifest, files=files).to_bytes()
        )
        assert "outside" in faccel.checkpoint.checkpoints(tmp_path)[0].problem
    assert isinstance(manifest, Manifest)


def test_an_error_names_the_value_that_cannot_be_stored(tmp_path):
    for value in (lambda: 0, object(), torch.eye(2).to_sparse(), np.array(["a"]), {"f": print}):
        with pytest.raises(CheckpointError, match="deep/bad"):
            faccel.save({"deep": {"bad": value}}, tmp_path, ONE, step=1)
    assert faccel.checkpoint.checkpoints(tmp_path) == []
    assert [p.name for p in tmp_path.iterdir()] in ([], [".lock"])


MISFITS = {
    "not in the checkpoint": lambda state: state | {"extra": 1},
    "only in the checkpoint": lambda state: state | {"model": faccel.wrap(nn.Linear(4, 8), ONE)},
    r"\[9, 4\] in the model": lambda state: state | {"model": faccel.wrap(Wider(), ONE)},
    "float64": lambda state: state | {"model": faccel.wrap(Net().double(), ONE)},
    "an optimizer in the checkpoint": lambda state: state | {"opt": None},
    "a model in the checkpoint": lambda state: state | {"model": {}},
    "an object with `state_dict`": lambda state: state | {"schedule": 1},
}


class Wider(Net):
    def __init__(self):
        super().__init__()
        self.layers[0], self.layers[1], self.layers[3] = (
            nn.Linear(4, 9),
            nn.BatchNorm1d(9),
            nn.Linear(9, 1),
        )


@pytest.mark.parametrize("message", MISFITS)
def test_a_state_that_does_not_fit_raises_before_it_is_changed(tmp_path, message):
    save_trained(tmp_path, 1)
    state = MISFITS[message](make(ONE, seed=5))
    before = repr(state["opt"].state_dict()) if state["opt"] else ""
    weights = parameters(state) if hasattr(state["model"], "state_dict") else {}
    with pytest.raises(CheckpointError, match=message):
        faccel.load(state, tmp_path, ONE)
    assert weights == {} or equal(parameters(state), weights)
    assert before == (repr(state["opt"].state_dict()) if state["opt"] else "")


def test_a_part_of_a_state_is_loaded(tmp_path):
    _, expected = save_trained(tmp_path)
    state = faccel.load({"model": make(ONE, seed=9)["model"], "step": None}, tmp_path, ONE)
    assert state["step"] == 2
    assert equal(parameters(state), expected)


def steps(path):
    existing = faccel.checkpoint.checkpoints(path)
    return [checkpoint.step for checkpoint in existing if checkpoint.problem is None]


def test_a_step_must_be_above_the_newest(tmp_path):
    faccel.save({"x": 1}, tmp_path, ONE, step=5)
    for step in (5, 3):
        with pytest.raises(CheckpointError, match="step 5 at"):
            faccel.save({"x": 2}, tmp_path, ONE, step=step)
    with pytest.raises(ConfigError):
        faccel.save({}, tmp_path, ONE, step=-1)
    assert faccel.load({"x": 0}, tmp_path, ONE) == {"x": 1}


def test_overwriting_deletes_newer_checkpoints_after_the_commit(tmp_path):
    for step in (1, 2, 3, 4):
        faccel.save({"x": step}, tmp_path, ONE, step=step)
    faccel.save({"x": 20}, tmp_path, ONE, step=2, overwrite=True)
    assert steps(tmp_path) == [2, 1]
    assert faccel.load({"x": 0}, tmp_path, ONE) == {"x": 20}
    faccel.save({"x": 30}, tmp_path, ONE, step=3)
    assert steps(tmp_path) == [3, 2, 1]


def test_policies_choose_the_checkpoints_to_keep(tmp_path):
    keep = (
        faccel.checkpoint.keep_latest(2)
        | faccel.checkpoint.keep_best(1, "accuracy")
        | faccel.checkpoint.keep_every(4)
    )
    for step, accuracy in enumerate([0.1, 0.9, 0.3, 0.5, 0.4, 0.2, 0.6], start=1):
        faccel.save(
            {"x": step}, tmp_path, ONE, step=step, keep=keep, metadata={"accuracy": accuracy}
        )
    assert steps(tmp_path) == [7, 6, 4, 2]
    faccel.save({"x": 8}, tmp_path, ONE, step=8, keep=1)
    assert steps(tmp_path) == [8]
    with pytest.raises(ConfigError):
        faccel.save({"x": 8}, tmp_path, ONE, step=9, keep=0)


def test_only_committed_checkpoints_count_when_older_ones_are_deleted(tmp_path):
    for step in (1, 2, 3):
        faccel.save({"x": torch.ones(step)}, tmp_path, ONE, step=step)
    for step in (2, 3):  # broken by a disk
        os.truncate(next(pathlib.Path(tmp_path, f"step-{step:09d}").glob("*.safetensors")), 3)
    faccel.save({"x": torch.ones(4)}, tmp_path, ONE, step=4, keep=2)
    assert steps(tmp_path) == [4, 1]


def test_a_corrupt_checkpoint_is_renamed_when_its_step_is_saved_again(tmp_path):
    faccel.save({"x": torch.ones(1)}, tmp_path, ONE, step=1)
    os.truncate(next(pathlib.Path(tmp_path, "step-000000001").glob("*.safetensors")), 3)
    assert faccel.latest(tmp_path, ONE) is None
    faccel.save({"x": torch.ones(2)}, tmp_path, ONE, step=1)
    assert steps(tmp_path) == [1]
    assert len(list(tmp_path.glob("*corrupt*"))) == 1
    assert faccel.load({"x": None}, tmp_path, ONE)["x"].shape == (2,)


def test_the_next_save_deletes_the_files_of_a_crashed_one(tmp_path):
    dead = tmp_path / ".tmp-step-000000009-abcd"
    dead.mkdir()
    (dead / "shard.safetensors").write_bytes(b"half")
    faccel.save({}, tmp_path, ONE, step=1)
    assert not dead.exists()


def test_a_second_writer_raises(tmp_path):
    from faccel.checkpoint.files import DirectoryLock

    faccel.save({"x": 1}, tmp_path, ONE, step=1)
    lock = DirectoryLock(tmp_path)
    try:
        with pytest.raises(CheckpointError, match="another writer"):
            faccel.save({"x": 2}, tmp_path, ONE, step=2)
    finally:
        lock.release()
    assert steps(tmp_path) == [1]
    faccel.save({"x": 2}, tmp_path, ONE, step=2)


def test_an_error_on_one_rank_raises_on_every_rank_and_keeps_the_older_checkpoint(tmp_path):
    def fn(ctx):
        faccel.save({"x": ctx.rank}, tmp_path, ctx, step=1)
        with pytest.raises(CheckpointError) as caught:
            faccel.save({"x": print if ctx.rank == 1 else 0}, tmp_path, ctx, step=2)
        assert faccel.load({"x": None}, tmp_path, ctx) == {"x": 0}
        return str(caught.value)

    first, second = simulate(fn, 2)
    assert "rank 1 could not begin" in first
    assert "without code" in second
    assert steps(tmp_path) == [1]


def test_a_directory_that_is_not_writable_raises(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="could not begin"):
        faccel.save({}, tmp_path / "file" / "runs", ONE, step=1)
    with pytest.raises(CheckpointError, match="could not begin"):
        faccel.save({}, "/proc/faccel", ONE, step=1)
    with pytest.raises(CheckpointError, match="a file"):
        faccel.checkpoint.checkpoints(tmp_path / "file")


def test_without_a_checkpoint_load_raises_and_latest_returns_none(tmp_path):
    assert simulate(lambda ctx: faccel.latest(tmp_path, ctx), 2) == (None, None)
    with pytest.raises(CheckpointError, match=r"faccel.latest"):
        faccel.load({}, tmp_path, ONE)
    faccel.save({}, tmp_path, ONE, step=1)
    with pytest.raises(CheckpointError, match="steps: 1"):
        faccel.load({}, tmp_path, ONE, step=2)


def test_a_later_update_does_not_change_a_background_save(tmp_path):
    def fn(ctx):
        x = torch.zeros(2_000_000)
        for step in (1, 2, 3):
            x.fill_(step)
            checkpoint = faccel.save({"x": x}, tmp_path, ctx, step=step, background=True)
            assert "still" in checkpoint.problem
            x.fill_(-1)
        assert faccel.latest(tmp_path, ctx).step == 3
        return [
            faccel.load({"x": None}, tmp_path, ctx, step=step)["x"].unique().tolist()
            for step in (1, 2, 3)
        ]

    assert simulate(fn, 2) == ([[1.0], [2.0], [3.0]],) * 2


def test_an_error_in_the_background_is_raised_by_the_next_call_on_every_rank(tmp_path):
    def fn(ctx):
        faccel.save({"x": 1}, tmp_path, ctx, step=1, background=True)
        faccel.save({"x": torch.ones(3)}, tmp_path, ctx, step=2)
        broken = faccel.checkpoint.KeepPolicy(lambda existing: 1 / 0)
        faccel.save({"x": torch.ones(3)}, tmp_path, ctx, step=3, background=True, keep=broken)
        with pytest.raises(CheckpointError, match="background"):
            faccel.save({"x": 4}, tmp_path, ctx, step=4)
        faccel.save({"x": 4}, tmp_path, ctx, step=4)

    simulate(fn, 2)
    assert steps(tmp_path) == [4, 2, 1]


def test_an_error_in_the_background_is_raised_by_shutdown(tmp_path):
    broken = faccel.checkpoint.KeepPolicy(lambda existing: 1 / 0)
    with pytest.raises(CheckpointError, match="ZeroDivisionError"), faccel.init(env={}) as ctx:
        faccel.save({"x": 1}, tmp_path, ctx, step=1, background=True, keep=broken)


def test_a_warning_reports_each_corrupt_checkpoint_that_was_skipped(tmp_path, caplog):
    for step in (1, 2, 3):
        faccel.save({"x": torch.full((3,), step)}, tmp_path, ONE, step=step)
    for step, flip in ((3, 1000), (2, None)):
        file = next(pathlib.Path(tmp_path, f"step-{step:09d}").glob("*.safetensors"))
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data if flip else data[:-1])
    with caplog.at_level(logging.WARNING):
        assert faccel.load({"x": None}, tmp_path, ONE)["x"].tolist() == [1, 1, 1]
    assert "step-000000003" in caplog.text
    assert "is corrupt: its hash differs" in caplog.text
    assert "bytes instead of" in caplog.text
    with pytest.raises(CheckpointError, match="step 3"):
        faccel.load({"x": None}, tmp_path, ONE, step=3)


def test_dcp_and_safetensors_read_the_files(tmp_path):
    import torch.distributed.checkpoint as dcp
    from safetensors.torch import load_file

    checkpoint, expected = save_trained(tmp_path, 1)
    files = [load_file(file) for file in pathlib.Path(checkpoint.path).glob("*.safetensors")]
    assert torch.equal(files[0]["model/layers.0.weight"], expected["layers.0.weight"])
    target = {"model/layers.0.weight": torch.zeros(8, 4)}
    with pytest.warns(UserWarning):
        dcp.load(target, storage_reader=dcp.HuggingFaceStorageReader(checkpoint.path))
    assert torch.equal(target["model/layers.0.weight"], expected["layers.0.weight"])


class Versioned(nn.Linear):
    """A module that migrates what older versions wrote."""

    _version = 2

    def _load_from_state_dict(self, state, prefix, local_metadata, *args):
        if local_metadata.get("version", 1) < 2:
            state[f"{prefix}weight"] = state[f"{prefix}weight"] * 10
        super()._load_from_state_dict(state, prefix, local_metadata, *args)


def test_a_module_gets_the_version_that_saved_its_state(tmp_path):
    net = Versioned(1, 1)
    weight = net.weight.item()
    faccel.save({"net": net}, tmp_path, ONE, step=1)
    faccel.load({"net": net}, tmp_path, ONE)
    assert net.weight.item() == weight


def test_tensors_under_similar_keys_have_different_names(tmp_path):
    tensors = {
        1: torch.tensor(10.0),
        "1": torch.tensor(20.0),
        "#1": torch.tensor(30.0),
        (1, "1"): torch.tensor(40.0),
    }
    state = {"x": tensors, "__metadata__": torch.ones(1), "n": {np.int64(1): "a", np.int64(2): "b"}}
    faccel.save(state, tmp_path, ONE, step=1)
    back = faccel.load({"x": None, "__metadata__": None, "n": {}}, tmp_path, ONE)
    assert {key: x.item() for key, x in back["x"].items()} == {
        1: 10,
        "1": 20,
        "#1": 30,
        (1, "1"): 40,
    }
    assert back["n"] == {1: "a", 2: "b"}


def test_lists_of_values_change_their_length_and_lists_of_models_do_not(tmp_path):
    net = nn.Linear(1, 1)
    state = {
        "history": [Pair(1, torch.ones(())), Pair(2, torch.ones(()))],
        "metrics": {"loss": [1.0]},
        "nets": {0: net},
    }
    faccel.save(state, tmp_path, ONE, step=1)
    back = faccel.load({"history": [], "metrics": {}, "nets": {0: net}}, tmp_path, ONE)
    assert back["history"] == state["history"]
    assert back["metrics"] == {"loss": [1.0]}
    for wrong in (
        {"nets": {0: net, 1: nn.Linear(1, 1)}},
        {"nets": [net, net]},
        {"metrics": {"accuracy": 0}},
    ):
        with pytest.raises(CheckpointError, match="does not fit"):
            faccel.load(wrong, tmp_path, ONE)


def test_an_error_of_any_type_on_one_rank_raises_on_every_rank(tmp_path):
    class Broken(Counted):
        def state_dict(self):
            raise KeyError("mine")

    def fn(ctx):
        for bad in ({"metadata": {"a": object()}}, {}):
            with pytest.raises(CheckpointError):
                faccel.save(
                    {"x": Broken() if not bad and ctx.rank else 0}, tmp_path, ctx, step=1, **bad
                )
        left = (
            [name for name in os.listdir(tmp_path) if name.startswith(".tmp-")]
            if ctx.is_main
            else []
        )
        assert left == []
        faccel.save({"x": 1}, tmp_path, ctx, step=1)
        return faccel.load({"x": 0}, tmp_path, ctx)["x"]

    assert simulate(fn, 2) == (1, 1)


def test_the_lock_is_released_although_a_forked_worker_has_a_copy(tmp_path):
    faccel.save({"x": torch.zeros(4_000_000)}, tmp_path, ONE, step=1, background=True)
    loader = DataLoader(range(4), num_workers=1, persistent_workers=True)
    iterator = iter(loader)  # forks while the lock is held
    next(iterator)
    faccel.save({"x": 1}, tmp_path, ONE, step=2)
    assert steps(tmp_path) == [2, 1]


def test_preemption_on_one_rank_is_not_collective(tmp_path):
    def fn(ctx):
        if ctx.is_main:
            ctx.lifetime.on_close(lambda: None)  # as `preemption` does on a main thread
        faccel.save({"x": 1}, tmp_path, ctx, step=1)
        return faccel.latest(tmp_path, ctx).step

    assert simulate(fn, 2) == (1, 1)


def test_shutdown_waits_for_a_rank_that_is_still_writing(tmp_path):
    """The time limit is for a rank that writes nothing, not for a slow one."""
    from faccel.checkpoint.background import PendingSave, wait_for_markers

    (tmp_path / "shard").write_bytes(b"")

    def slow(pending):
        for _ in range(20):
            with open(tmp_path / "shard", "ab") as file:
                file.write(b"x")
            threading.Event().wait(0.02)
        (tmp_path / "rank-00000.json").write_text('{"files": []}')

    def wait(pending):
        pending.stall_timeout_s = 0.2
        assert wait_for_markers(str(tmp_path), 1, 60, pending) == []

    writer, reader = PendingSave(slow), PendingSave(wait)
    assert writer.error() is None
    assert reader.error() is None


def test_a_policy_that_raises_leaves_all_checkpoints_unchanged(tmp_path):
    faccel.save({"x": 1}, tmp_path, ONE, step=1)
    with pytest.raises(CheckpointError, match="ZeroDivisionError"):
        faccel.save(
            {"x": 2},
            tmp_path,
            ONE,
            step=2,
            keep=faccel.checkpoint.KeepPolicy(lambda existing: 1 / 0),
        )
    assert steps(tmp_path) == [1]
    with pytest.raises(ConfigError):
        faccel.checkpoint.keep_latest(1.5)
    faccel.save(
        {"x": 2},
        tmp_path,
        ONE,
        step=2,
        keep=faccel.checkpoint.keep_best(1, "a"),
        metadata={"a": None},
    )
    assert steps(tmp_path) == [2]


def test_links_to_other_files_are_not_read(tmp_path):
    faccel.save({"x": torch.zeros(3)}, tmp_path / "a", ONE, step=1)
    other = faccel.save({"x": torch.full((3,), 666.0)}, tmp_path / "b", ONE, step=1)
    folder = faccel.checkpoint.checkpoints(tmp_path / "a")[0].path
    shard = next(pathlib.Path(other.path).glob("*.safetensors"))
    os.symlink(shard, pathlib.Path(folder, "zz.safetensors"))
    assert faccel.load({"x": None}, tmp_path / "a", ONE)["x"].tolist() == [0, 0, 0]
    original = next(pathlib.Path(folder).glob("shard*"))
    original.unlink()
    os.symlink(shard, original)
    with pytest.raises(CheckpointError, match="missing"):
        faccel.load({"x": None}, tmp_path / "a", ONE)


def test_optimizers_with_unusual_states_are_restored(tmp_path):
    net = nn.Linear(2, 1)
    opt = torch.optim.SGD(
        [{"params": []}, {"params": list(net.parameters())}, {"params": [], "lr": 7.0}], lr=0.1
    )
    opt.state["count"] = {"n": 3}
    opt.state[net.weight] = {"seen": 5, "x": torch.ones(1, 2)}
    faccel.save({"net": net, "opt": opt}, tmp_path, ONE, step=1)
    loaded = torch.optim.SGD(
        [{"params": []}, {"params": list(net.parameters())}, {"params": []}], lr=0.3
    )
    faccel.load({"net": net, "opt": loaded}, tmp_path, ONE)
    assert [group["lr"] for group in loaded.param_groups] == [0.1, 0.1, 7.0]
    assert loaded.state["count"] == {"n": 3}
    assert loaded.state[net.weight]["seen"] == 5
    assert loaded.state[net.weight]["x"].tolist() == [[1, 1]]


def test_additional_ranks_get_different_random_states_that_are_equal_on_every_load(tmp_path):
    save_trained(tmp_path, 2)

    def fn(ctx):
        faccel.set_rng_state(faccel.load({"rng": None}, tmp_path, ctx)["rng"])
        return torch.rand(3).tolist()

    first, second = simulate(fn, 5), simulate(fn, 5, seed=9)
    assert first == second
    assert len({tuple(draw) for draw in first}) == 5


def test_a_run_resumes_from_an_older_checkpoint_if_newer_ones_have_flipped_bits(tmp_path):
    for step in (1, 2, 3):
        faccel.save({"x": torch.full((3,), float(step))}, tmp_path, ONE, step=step)
    for step in (2, 3):
        file = next(pathlib.Path(tmp_path, f"step-{step:09d}").glob("*.safetensors"))
        file.write_bytes(file.read_bytes()[:-1] + b"\7")
    assert faccel.load({"x": None}, tmp_path, ONE)["x"].tolist() == [1, 1, 1]
    faccel.save({"x": torch.full((3,), 20.0)}, tmp_path, ONE, step=2)
    assert steps(tmp_path) == [2, 1]
    assert len(list(tmp_path.glob("*.corrupt-*"))) == 2
    assert faccel.load({"x": None}, tmp_path, ONE)["x"].tolist() == [20, 20, 20]


@pytest.mark.parametrize("name", ["step", "path", "background", "overwrite"])
def test_an_argument_that_differs_between_ranks_raises_on_every_rank(tmp_path, name):
    def fn(ctx):
        arguments = {"step": 1, "path": tmp_path, "background": False, "overwrite": False}
        if ctx.rank:
            arguments[name] = {
                "step": 2,
                "path": tmp_path / "b",
                "background": True,
                "overwrite": True,
            }[name]
        with pytest.raises(CheckpointError, match=f"`{name}` differs between ranks"):
            faccel.save({"x": 1}, arguments.pop("path"), ctx, **arguments)
        return faccel.latest(tmp_path, ctx)

    assert simulate(fn, 2) == (None, None)


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("mount") is None, reason="needs root to mount a small disk"
)
@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_raises_and_keeps_the_older_checkpoint(tmp_path, background):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)], check=False
    ).returncode:
        pytest.skip("a small disk cannot be mounted here")
    try:

        def fn(ctx):
            faccel.save({"x": torch.ones(10)}, disk / "runs", ctx, step=1)
            with pytest.raises(CheckpointError, match="No space left") as caught:
                faccel.save(
                    {"x": torch.ones(10**6)}, disk / "runs", ctx, step=2, background=background
                )
                faccel.latest(disk / "runs", ctx)
            assert caught.value.fix == "free disk space"
            return faccel.load({"x": None}, disk / "runs", ctx)["x"].shape

        assert simulate(fn, 2) == (torch.Size([10]),) * 2
        assert steps(disk / "runs") == [1]
        assert [name for name in os.listdir(disk / "runs") if name.startswith(".tmp")] == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize(
    "saved_value", [None, 1, "x", {"weight": torch.ones(1)}, [1], torch.ones(1)], ids=str
)
def test_a_stored_value_does_not_fit_an_object(tmp_path, saved_value):
    faccel.save({"x": saved_value, "n": 1}, tmp_path, ONE, step=1)
    net = nn.Linear(1, 1)
    for target in (
        net,
        torch.optim.SGD(net.parameters(), lr=1.0),
        Counted(),
        faccel.rng_state(ONE),
    ):
        with pytest.raises(CheckpointError, match="does not fit"):
            faccel.load({"x": target}, tmp_path, ONE)


def test_a_nested_part_of_a_state_is_loaded(tmp_path):
    net = nn.Linear(1, 1)
    faccel.save({"a": {"net": net, "n": 1}, "t": {"x": 1, "y": 2}}, tmp_path, ONE, step=1)
    assert faccel.load({"a": {"n": 0}, "t": {"x": 0}}, tmp_path, ONE) == {
        "a": {"n": 1},
        "t": {"x": 1},
    }
    assert faccel.load({"t": {}}, tmp_path, ONE) == {"t": {"x": 1, "y": 2}}
    assert faccel.load({}, tmp_path, ONE) == {}


def test_the_size_of_a_folder_is_read_while_files_are_renamed(tmp_path):
    from faccel.checkpoint.background import folder_size

    stop = threading.Event()

    def rename():
        while not stop.is_set():
            (tmp_path / "a").write_bytes(b"x")
            os.rename(tmp_path / "a", tmp_path / "b")

    thread = threading.Thread(target=rename)
    thread.start()
    sizes = {folder_size(str(tmp_path)) for _ in range(3000)}
    stop.set()
    thread.join()
    assert sizes <= {0, 1, 2}


def test_swapped_arguments_raise_an_error_with_the_correct_call(tmp_path):
    for call, function in (("faccel.save", faccel.save), ("faccel.load", faccel.load)):
        with pytest.raises(ConfigError, match="`state` and `path` are swapped") as caught:
            function(tmp_path, {"x": 1}, ONE, step=1)
        assert f"{call}(state, path, ctx" in caught.value.fix
    with pytest.raises(ConfigError, match="`path` must be a str"):
        faccel.load({"x": 1}, None, ONE)
    with pytest.raises(ConfigError, match="`model` and `path` are swapped"):
        faccel.checkpoint.export_model(tmp_path, nn.Linear(1, 1), ONE)
    assert list(tmp_path.iterdir()) == []


def test_an_error_that_cannot_be_hashed_raises_on_every_rank(tmp_path):
    @dataclasses.dataclass  # with `__eq__` and without `__hash__`
    class BadShardError(Exception):
        index: int

    class Broken(Counted):
        def state_dict(self):
            raise BadShardError(3)

    def fn(ctx):
        state = {"x": Broken() if ctx.rank else Counted()}
        with pytest.raises(CheckpointError, match="BadShardError"):
            faccel.save(state, tmp_path, ctx, step=1)

    simulate(fn, 2)


def test_a_background_save_keeps_only_its_copy_of_the_state_in_memory(tmp_path):
    class Temporary(Counted):
        def state_dict(self):
            memory = np.ones(3)
            memories.append(weakref.ref(memory))
            return {"x": torch.from_numpy(memory)}

    memories = []
    ctx = fake_context(0, 1)
    faccel.save({"x": Temporary()}, tmp_path, ctx, step=1, background=True)
    gc.collect()
    assert [memory() is None for memory in memories] == [True]
    assert faccel.latest(tmp_path, ctx).step == 1


def test_a_background_save_ends_when_the_other_ranks_are_not_reachable(tmp_path):
    from faccel.checkpoint.background import PendingSave

    release = threading.Event()
    thread_ended = threading.Event()

    def write(pending):
        while pending.stall_timeout_s is None and not release.wait(0.01):
            pass
        if not release.is_set():
            thread_ended.set()

    def fn(ctx):
        ctx.lifetime.on_close(PendingSave(write if ctx.is_main else lambda pending: None))
        try:
            faccel.latest(tmp_path, ctx)
        except DesyncError:  # on rank 0
            assert thread_ended.is_set()
            raise

    # The first collective is a barrier, in the second one the ranks exchange their errors.
    fault = Fault(rank=1, collective=1, kind="raise")
    try:
        with pytest.raises(InjectedError):  # on rank 1, the cause
            simulate(fn, 2, faults=[fault])
        assert thread_ended.is_set()
    finally:
        release.set()


def test_nothing_is_left_of_a_failed_save_while_another_rank_is_still_writing(tmp_path):
    from faccel.checkpoint.save_request import SaveRequest
    from faccel.checkpoint.transaction import SaveTransaction

    def write(folder, started):
        number = 0
        with suppress(FileNotFoundError):  # the folder is gone
            while True:
                (folder / str(number)).write_bytes(b"x")
                started.set()
                number += 1

    for step in range(20):
        transaction = SaveTransaction(SaveRequest(str(tmp_path), step, True, True, False), ONE)
        transaction.plan({"x": torch.ones(2)})
        started = threading.Event()
        folder = pathlib.Path(transaction.destination.temporary)
        writer = threading.Thread(target=write, args=(folder, started))
        writer.start()
        started.wait()
        transaction.close()
        writer.join(timeout=60)
        assert os.listdir(tmp_path) == [".lock"]
