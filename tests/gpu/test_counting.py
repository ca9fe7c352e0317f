"""The counters of the benchmark count what is known."""

import torch
from torch.utils.checkpoint import checkpoint

from tests.gpu.counting import peak_bytes, synchronisations


def test_each_read_of_a_value_is_a_synchronisation(device):
    x = torch.ones(8, device=device, requires_grad=True)
    with synchronisations(device) as places:
        loss = x.square().sum()
        loss.backward()
        x.grad.mul_(2)
    assert places.total() == 0, places
    for read in (loss.item, lambda: bool(x.isfinite().all()), lambda: x.nonzero()):
        with synchronisations(device) as places:
            read()
        assert places.total() >= 1, places


def test_the_memory_of_the_tensors_that_are_alive_at_once_is_counted(device):
    size = 1 << 20

    def two_of_three():
        x = torch.ones(size, device=device)
        y = x + 1
        del x
        z = y + 1
        return z

    assert 8 * size <= peak_bytes(device, two_of_three) < 8.1 * size


def test_activation_checkpointing_needs_less_memory(device):
    def unit():
        layers = [layer for _ in range(4) for layer in (torch.nn.Linear(64, 64), torch.nn.Tanh())]
        return torch.nn.Sequential(*layers)

    net = torch.nn.ModuleList(unit() for _ in range(8)).to(device)

    def run(is_checkpointed):
        x = torch.ones(4096, 64, device=device)
        for layer in net:
            x = checkpoint(layer, x, use_reentrant=False) if is_checkpointed else layer(x)
        x.sum().backward()

    run(False)  # the gradients are there from now on
    assert peak_bytes(device, lambda: run(True)) < 0.5 * peak_bytes(device, lambda: run(False))
