"""Placed models on two pretended accelerators, the host and the disk."""

import functools
import shutil

import pytest
import torch
from torch import nn

from faccel.checkpoint import export_model
from faccel.inference import materialize, offload, on_meta, place
from faccel.inference.copies import StreamCopies
from tests.accelerator import device, job
from tests.ranks import run_ranks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which("g++") and shutil.which("ninja")), reason="needs g++ and ninja"
    ),
]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8, bias=False)

    def forward(self, x, *, shift):
        return x + self.down(torch.relu(self.up(x + shift["add"])))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(8))
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("shift", torch.linspace(0, 1, 8))

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x, shift={"add": self.shift})
        return self.head(x)


IDS = torch.tensor([[1, 5, 11], [0, 2, 4]])


def run_on_accelerators(ctx, folder):
    """Return the outputs of each placement and of the CPU, and the devices of the placements."""
    torch.manual_seed(0)
    net = Net()
    first = str(ctx.device)
    second = f"{ctx.device.type}:{ctx.device.index + 1}"
    with torch.no_grad():
        expected = net(IDS)
    export_model(net, folder, ctx)
    outputs, devices = [], []
    # A block has 1088 bytes, the embedding 384, the buffer 32.
    for budget in (
        {first: "1MB"},
        {first: "1MB", second: "1MB"},
        {first: 4000, second: 2300, "cpu": 2300, "disk": "1MB"},
        {first: 2700, "disk": "1MB"},
    ):
        with on_meta():
            empty = Net()
        inputs = {}
        for name, block in empty.blocks.named_children():
            block.register_forward_pre_hook(
                lambda _, args, kwargs, name=name, seen=inputs: seen.update(
                    {f"blocks.{name}": {args[0].device, kwargs["shift"]["add"].device}}
                ),
                with_kwargs=True,
            )
        placed = place(empty, folder, ctx, budget=budget)
        devices.append(sorted(set(placed.placement.device_map.values())))
        for ids in (IDS, IDS, IDS.to(ctx.device)):
            output = placed(ids)
            assert output.device == ids.device
            outputs.append(output.cpu())
        for name, seen in inputs.items():
            where = placed.placement.device_map[name]
            expected_device = second if where == second else first
            assert seen == {torch.device(expected_device)}, name
        module = materialize(placed)
        assert {param.device for param in module.parameters()} == {ctx.device}
        outputs.append(module(IDS.to(ctx.device)).detach().cpu())
    net.to(ctx.device)
    placed = offload(net, "cpu", ctx)
    outputs.append(placed(IDS))
    outputs.append(materialize(placed)(IDS.to(ctx.device)).detach().cpu())
    return outputs, expected, devices


def copied_in_chunks(ctx):
    """Return a tensor that was copied through chunks of 16 elements, and how many were late."""
    values = torch.arange(100.0)
    copies = StreamCopies(ctx.device, largest=64)
    tensor = copies.allocate(400).view(torch.float32)
    before = torch.get_device_module(ctx.device).num_late()

    def read():
        copies.read_param(
            lambda name, part, start: part.copy_(values[start : start + part.numel()]), "x", tensor
        )

    end = copies.fill(copies.mark(), read)
    copies.wait(end)
    num_late = torch.get_device_module(ctx.device).num_late() - before
    return tensor.cpu(), num_late


def test_a_tensor_is_copied_in_chunks_that_are_not_overwritten_too_early():
    kind = "npu"
    before = functools.partial(device.enable, device.library_path(), kind)
    ((tensor, num_late),) = run_ranks(copied_in_chunks, 1, before=before, env=job.launch_env(kind))
    assert tensor.tolist() == list(range(100))
    assert num_late == 7  # 100 elements by 16


@pytest.mark.parametrize("kind", ["npu", "musa"])
def test_placed_models_equal_the_cpu(kind, tmp_path):
    before = functools.partial(device.enable, device.library_path(), kind)
    options = {"before": before, "env": job.launch_env(kind)}
    ((outputs, expected, devices),) = run_ranks(run_on_accelerators, 1, str(tmp_path), **options)
    first, second = f"{kind}:0", f"{kind}:1"
    assert devices == [
        [first],
        [first, second],
        ["cpu", "disk", first, second],
        ["disk", first],
    ]
    assert len(outputs) == 4 * 4 + 2
    for output in outputs:
        assert torch.allclose(output, expected, atol=1e-6)
