"""A run of Accelerate that saves its state in the middle and prints the losses that follow."""

import argparse
import json
import os

import torch
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

SAVE_AT = 3


class Net(torch.nn.Module):
    """A network with dropout, buffers and a tied parameter."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(6, 6)
        self.norm = torch.nn.BatchNorm1d(6)
        self.tied = torch.nn.Linear(6, 6)
        self.tied.weight = self.first.weight
        self.last = torch.nn.Linear(6, 1)

    def forward(self, x):
        x = F.dropout(self.norm(self.first(x)), 0.5, self.training)
        return self.last(self.tied(x).relu()).squeeze(-1)


class Counter:
    """An object that the run has registered."""

    def __init__(self):
        self.best = 0.0

    def state_dict(self):
        return {"best": self.best}

    def load_state_dict(self, state):
        self.best = state["best"]


def dataset():
    inputs = torch.randn(32, 6, generator=torch.Generator().manual_seed(1))
    return TensorDataset(inputs, inputs.sum(1))


def optimizer_of(model):
    # Two groups, so that the order of the optimizer is not that of the model.
    biases = [param for param in model.parameters() if param.ndim == 1]
    weights = [param for param in model.parameters() if param.ndim > 1]
    return torch.optim.AdamW([{"params": biases, "weight_decay": 0.0}, {"params": weights}], lr=0.1)


def schedule_of(opt):
    return torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + step))


def replicated(folder, *, is_safe):
    # In the functions: the tests import the network from here, without Accelerate.
    from accelerate import Accelerator
    from accelerate.utils import set_seed

    set_seed(0)
    accelerator = Accelerator(cpu=True)
    model = Net()
    opt = optimizer_of(model)
    schedule, counter = schedule_of(opt), Counter()
    loader = DataLoader(dataset(), 4)
    model, opt, loader, schedule = accelerator.prepare(model, opt, loader, schedule)
    accelerator.register_for_checkpointing(counter)
    losses = []
    for step, (x, y) in enumerate(loader):
        if step == SAVE_AT:
            counter.best = 0.25
            accelerator.save_state(folder, safe_serialization=is_safe)
        loss = F.mse_loss(model(x), y)
        accelerator.backward(loss)
        opt.step()
        schedule.step()
        opt.zero_grad()
        losses.append(loss.item())
    return losses[SAVE_AT:]


def sharded(folder, kind):
    from accelerate import Accelerator
    from accelerate.utils import FullyShardedDataParallelPlugin, set_seed
    from accelerate.utils.fsdp_utils import save_fsdp_model, save_fsdp_optimizer

    set_seed(0)
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    torch.distributed.init_process_group("gloo", world_size=1, rank=0)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, state_dict_type=kind, cpu_ram_efficient_loading=False
    )
    accelerator = Accelerator(cpu=True)
    model = Net()
    model.tied.weight = torch.nn.Parameter(model.tied.weight.detach().clone())
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    opt = torch.optim.AdamW(model.parameters(), lr=0.1)
    losses = []
    for step, (x, y) in enumerate(DataLoader(dataset(), 4)):
        if step == SAVE_AT:
            accelerator.save_state(folder)
            save_fsdp_model(plugin, accelerator, model, folder)
            save_fsdp_optimizer(plugin, accelerator, opt, model, folder)
        loss = F.mse_loss(model(x), y)
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    torch.distributed.destroy_process_group()
    return losses[SAVE_AT:]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("kind")
    parser.add_argument("folder")
    options = parser.parse_args()
    if options.kind in ("safetensors", "pickles"):
        losses = replicated(options.folder, is_safe=options.kind == "safetensors")
    else:
        losses = sharded(options.folder, options.kind)
    print(json.dumps(losses))
