"""The format on disk: an older checkpoint loads, and its state gives the same manifest today.

`checkpoint/` was written by `save_golden` on two simulated ranks. Write it again only for a new
version of the format: python -m tests.golden.test_checkpoint_format
"""

import math
import pathlib
import shutil
from collections import Counter, OrderedDict
from typing import NamedTuple

import attrs
import numpy as np
import torch
from torch import nn

import faccel
from faccel.checkpoint.manifest import read_manifest
from faccel.testing import fake_context, simulate

GOLDEN = pathlib.Path(__file__).parent / "checkpoint"
ONE = fake_context(0, 1)


class Pair(NamedTuple):
    a: int
    b: torch.Tensor


@attrs.frozen
class Record:
    name: str
    _private: float


class Counted:
    def __init__(self, count):
        self.count = count

    def state_dict(self):
        return {"count": self.count, "x": torch.full((2,), float(self.count))}

    def load_state_dict(self, state):
        self.count = int(state["x"][0]) and state["count"]


def sharded_linear(ctx, value):
    """A linear layer whose weight has three rows on two ranks."""
    from torch.distributed.tensor import Shard, distribute_tensor

    net = nn.Linear(2, 3, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.arange(6.0).reshape(3, 2) + value)
    if ctx.world_size > 1:
        mesh = ctx.mesh.device_mesh
        net.weight = nn.Parameter(distribute_tensor(net.weight.detach(), mesh, [Shard(0)]))
    return net


def build(ctx, value):
    """A state with every kind of value, as it is after `value` updates from equal gradients."""
    from tensordict import TensorDict

    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    with torch.no_grad():
        for param in net.parameters():
            param.fill_(0.25)
    model = faccel.wrap(net, ctx)
    opt = torch.optim.AdamW(
        [{"params": [net[0].weight]}, {"params": [net[0].bias, *net[1].parameters()], "lr": 0.5}],
        lr=0.25,
    )
    schedule = torch.optim.lr_scheduler.StepLR(opt, 2, gamma=0.5)
    for _ in range(value):
        for param in net.parameters():
            param.grad = torch.ones_like(param)
        opt.step()
        schedule.step()
    sharded = sharded_linear(ctx, value)
    faccel.seed_everything(value, ctx, per_data_rank=True)
    return {
        "model": model,
        "sharded": sharded,
        "opt": opt,
        "schedule": schedule,
        "scaler": faccel.init_scaler(ctx),
        "rng": faccel.rng_state(ctx),
        "cursor": faccel.Cursor(value, 96),
        "counted": Counted(value),
        "tensordict": TensorDict({"a": torch.full((2, 3), value), "b": {"c": torch.zeros(2)}}, [2]),
        "values": {
            "none": None,
            "bool": True,
            "int": 2**80,
            "float": 0.1,
            "infinite": -math.inf,
            "text": 'é "quoted" \n',
            "bytes": b"\x00\xff",
            "complex": 1.5 - 2j,
            "tuple": (value, (2.5, "x"), []),
            "set": {1, 2},
            "frozenset": frozenset(["a"]),
            "numbered": {1: "a", (2, 3): "b", None: 4},
            "odd keys": {"a/b": torch.tensor(1), "a%2Fb": torch.tensor(2), "!": 3, "": 4},
            "counter": Counter("aab"),
            "ordered": OrderedDict(z=1, a=2),
            "dtype": torch.bfloat16,
            "device": torch.device("cpu"),
            "size": torch.Size([2, 3]),
            "scalar": np.float32(1.5),
            "array": np.arange(6).reshape(2, 3) * value,
            "pair": Pair(1, torch.tensor(2.0)),
            "record": Record("x", 2.0),
            "complex tensor": torch.tensor([1 + 2j, 3.0]),
            "bfloat16": torch.tensor([0.5, 2.0]).bfloat16(),
            "empty": torch.empty(0, 3),
            "strided": torch.arange(6.0).view(2, 3).T,
        },
    }


def save_golden(ctx, folder):
    return faccel.save(build(ctx, 3), folder, ctx, step=3, metadata={"accuracy": 0.5})


def as_plain(tree):
    """Replace tensors and arrays by lists, so that two states compare with `==`."""
    if isinstance(tree, dict):
        return type(tree)({key: as_plain(child) for key, child in tree.items()})
    if isinstance(tree, (list, tuple)) and not isinstance(tree, torch.Size):
        return [type(tree).__name__, *map(as_plain, tree)]
    if isinstance(tree, (torch.Tensor, np.ndarray)):
        return [type(tree).__name__, str(tree.dtype), tree.tolist()]
    return tree


def test_a_checkpoint_of_an_earlier_version_loads():
    expected, state = build(ONE, 3), build(ONE, 0)
    loaded = faccel.load(state, GOLDEN, ONE)
    assert as_plain(loaded["values"]) == as_plain(expected["values"])
    for name in ("model", "sharded", "opt", "schedule"):
        assert loaded[name] is state[name]
        assert as_plain(loaded[name].state_dict()) == as_plain(expected[name].state_dict()), name
    assert loaded["counted"].count == 3
    assert (loaded["scaler"], loaded["cursor"]) == (expected["scaler"], expected["cursor"])
    assert (loaded["tensordict"] == expected["tensordict"]).all()
    faccel.set_rng_state(loaded["rng"])
    draws = torch.rand(3)
    faccel.seed_everything(3, fake_context(0, 2), per_data_rank=True)
    assert torch.equal(draws, torch.rand(3))


def test_the_manifest_of_the_same_state_is_the_same(tmp_path):
    checkpoint = simulate(save_golden, 2, tmp_path)[0]
    written, golden = read_manifest(checkpoint.path), read_manifest(next(GOLDEN.iterdir()))
    assert written.state == golden.state
    assert [file.name for file in written.files] == [file.name for file in golden.files]
    assert attrs.evolve(written, created_s=0, files=()) == attrs.evolve(
        golden, created_s=0, files=()
    )


if __name__ == "__main__":
    shutil.rmtree(GOLDEN, ignore_errors=True)
    simulate(save_golden, 2, str(GOLDEN))
