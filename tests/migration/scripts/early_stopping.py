"""All processes stop when one of them has seen enough."""

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader

from tests.migration.toy import classifier, sentences


class Patience:
    def __init__(self, patience):
        self.patience, self.best, self.count = patience, None, 0

    def is_over(self, value):
        if self.best is None or value < self.best:
            self.best, self.count = value, 0
        else:
            self.count += 1
        return self.count >= self.patience


def main():
    accelerator = Accelerator()
    set_seed(3)
    patience = Patience(1)
    # Accelerate reads the order of an epoch again after a `break`, so all have one order
    train_dataloader = DataLoader(sentences(44, 0), 8, generator=torch.Generator())
    eval_dataloader = DataLoader(sentences(22, 1), 8)
    model = classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    model, optimizer, train_dataloader, eval_dataloader = accelerator.prepare(
        model, optimizer, train_dataloader, eval_dataloader
    )
    for epoch in range(4):
        model.train()
        for step, batch in enumerate(train_dataloader):
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            print("loss", loss.item())
            if patience.is_over(loss.item()):
                accelerator.set_trigger()
            # the flags of all processes together
            if accelerator.check_trigger():
                break
        print("loss", float(epoch))
    accelerator.end_training()


if __name__ == "__main__":
    main()
