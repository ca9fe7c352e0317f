"""A deep model of equal layers, and the memory of this process."""

import torch
from torch import nn


class DeepNet(nn.Module):
    def __init__(self, width, depth):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def status(field):
    """Return the bytes of a field of `/proc/self/status`, such as "VmRSS"."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))
