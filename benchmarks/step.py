"""Time of one training step of a tiny model on one process: loader, forward, backward, optimizer.

The same loop in plain PyTorch, faccel, Accelerate and Lightning Fabric, over a dataset that is read
item by item and over a TensorDataset, both shuffled. The model is so small that the overhead of the
framework dominates.

python benchmarks/step.py
"""

import itertools

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from lightning_fabric import Fabric
from measure import alternate, ratios, report, spread, table, target
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import faccel

NUM_FEATURES = 16
BATCH_SIZE = 32
NUM_STEPS = 250  # per round and contender: one epoch
ROUNDS = 30
LEARNING_RATE = 1e-2
SEED = 0


class Items(Dataset):
    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], self.y[i]


def make(dataset):
    torch.manual_seed(SEED)
    model = nn.Sequential(nn.Linear(NUM_FEATURES, 16), nn.ReLU(), nn.Linear(16, 2))
    opt = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    return model, opt, DataLoader(dataset, BATCH_SIZE, shuffle=True)


def raw_torch(dataset):
    model, opt, loader = make(dataset)

    def epoch():
        for x, y in loader:
            opt.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            opt.step()

    return epoch


def with_faccel(dataset):
    net, _, loader = make(dataset)
    ctx = faccel.init(device="cpu")
    train = faccel.shard(loader, ctx)
    model = faccel.wrap(net, ctx)
    opt = faccel.wrap_optimizer(torch.optim.SGD(model.parameters(), lr=LEARNING_RATE), model, ctx)
    scaler = faccel.init_scaler(ctx)
    epochs = itertools.count()

    def epoch():
        nonlocal scaler
        for x, y in train.at(next(epochs)):  # a new order every time, as in plain PyTorch
            loss = F.cross_entropy(model(x), y)
            scaler = faccel.scaled_backward(loss, scaler, ctx)
            _, scaler = faccel.optimizer_step(opt, scaler, ctx)

    return epoch


def with_accelerate(dataset):
    accelerator = Accelerator(cpu=True)
    model, opt, loader = accelerator.prepare(*make(dataset))

    def epoch():
        for x, y in loader:
            opt.zero_grad()
            loss = F.cross_entropy(model(x), y)
            accelerator.backward(loss)
            opt.step()

    return epoch


def with_fabric(dataset):
    fabric = Fabric(accelerator="cpu", devices=1)
    net, plain_opt, plain_loader = make(dataset)
    model, opt = fabric.setup(net, plain_opt)
    loader = fabric.setup_dataloaders(plain_loader)

    def epoch():
        for x, y in loader:
            opt.zero_grad()
            loss = F.cross_entropy(model(x), y)
            fabric.backward(loss)
            opt.step()

    return epoch


def measure(title, dataset):
    contenders = {
        "torch": raw_torch,
        "faccel": with_faccel,
        "accelerate": with_accelerate,
        "fabric": with_fabric,
    }
    seconds = alternate(
        {name: make_epoch(dataset) for name, make_epoch in contenders.items()}, ROUNDS
    )
    rows = table(f"{title}, time per step", seconds, "torch", calls=NUM_STEPS)
    return rows, spread(ratios(seconds, "faccel", "torch"))["median"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    x = torch.randn(NUM_STEPS * BATCH_SIZE, NUM_FEATURES)
    y = (x.sum(1) > 0).long()
    items, items_ratio = measure("a Dataset read item by item", Items(x, y))
    tensors, tensors_ratio = measure("a TensorDataset", TensorDataset(x, y))
    report(
        "step",
        {"batch_size": BATCH_SIZE, "steps_per_round": NUM_STEPS, "rounds": ROUNDS, "threads": 1},
        {"read item by item": items, "TensorDataset": tensors},
        [
            target("read item by item, faccel / torch", items_ratio, at_most=1.05),
            target("TensorDataset, faccel / torch", tensors_ratio, at_most=1.0),
        ],
    )
