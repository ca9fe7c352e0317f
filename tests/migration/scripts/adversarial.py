"""Two models and two optimizers that are prepared together: a painter and its critic."""

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def main():
    set_seed(0)
    accelerator = Accelerator()
    painter = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    critic = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1))
    opt_g = torch.optim.Adam(painter.parameters(), lr=1e-2)
    opt_d = torch.optim.Adam(critic.parameters(), lr=1e-2)
    data = TensorDataset(torch.randn(40, 2, generator=torch.Generator().manual_seed(0)))
    loader = DataLoader(data, batch_size=8, generator=torch.Generator())
    painter, critic, opt_g, opt_d, loader = accelerator.prepare(
        painter, critic, opt_g, opt_d, loader
    )
    bce = nn.BCEWithLogitsLoss()
    gen = torch.Generator().manual_seed(3)
    for epoch in range(2):
        for (real,) in loader:
            bs = real.size(0)
            # critic
            opt_d.zero_grad()
            d_real = critic(real)
            loss_real = bce(d_real, torch.ones_like(d_real))
            accelerator.backward(loss_real)
            z = torch.randn(bs, 4, generator=gen, device="cpu").to(accelerator.device)
            fake = painter(z)
            d_fake = critic(fake.detach())
            loss_fake = bce(d_fake, torch.zeros_like(d_fake))
            accelerator.backward(loss_fake)
            opt_d.step()
            # painter
            opt_g.zero_grad()
            d_fake = critic(fake)
            g_loss = bce(d_fake, torch.ones_like(d_fake))
            accelerator.backward(g_loss)
            opt_g.step()
            print("loss", (loss_real + loss_fake).item(), g_loss.item())


if __name__ == "__main__":
    main()
