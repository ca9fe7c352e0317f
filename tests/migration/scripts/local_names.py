"""Local names of an accelerator and of objects, which are attributes."""

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from tests.migration.toy import classifier, text_loaders


class Trainer:
    def __init__(self, accelerator, lr=0.01):
        self.accelerator = accelerator
        set_seed(3)
        self.net = classifier()
        self.o = torch.optim.AdamW(self.net.parameters(), lr=lr)
        self.data, self.held_out = text_loaders(8)
        self.net, self.o, self.data, self.held_out = accelerator.prepare(
            self.net, self.o, self.data, self.held_out
        )

    def step(self, batch):
        accelerator = self.accelerator
        net, o = self.net, self.o
        with accelerator.autocast():
            loss = net(**batch).loss
        accelerator.backward(loss)

        def log(x):
            accelerator.print("loss", x)

        accelerator.clip_grad_norm_(net.parameters(), 0.5)
        o.step()
        o.zero_grad()
        log(loss.item())

    def fit(self):
        for epoch in range(2):
            for batch in self.data:
                self.step(batch)
            self.score()

    def score(self):
        acc = self.accelerator
        net = self.net
        net.eval()
        for batch in self.held_out:
            with torch.no_grad():
                logits = net(**batch).logits
            logits, labels = acc.gather_for_metrics((logits, batch["labels"]))
            print("loss", torch.nn.functional.cross_entropy(logits, labels).item(), len(labels))
        net.train()


def main():
    accelerator = Accelerator(mixed_precision="bf16")
    Trainer(accelerator).fit()


if __name__ == "__main__":
    main()
