"""A trainer that stores the accelerator, made by a function."""

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from tests.migration.toy import classifier, text_loaders


def make_accelerator(num_micro_batches):
    return Accelerator(gradient_accumulation_steps=num_micro_batches)


class Trainer:
    def __init__(self, model, num_micro_batches=2):
        self.accelerator = make_accelerator(num_micro_batches)
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        self.train_dataloader, self.eval_dataloader = text_loaders(8)
        self.model, self.optimizer, self.train_dataloader, self.eval_dataloader = (
            self.accelerator.prepare(
                self.model, self.optimizer, self.train_dataloader, self.eval_dataloader
            )
        )

    def train(self, num_epochs):
        for epoch in range(num_epochs):
            self.model.train()
            for batch in self.train_dataloader:
                with self.accelerator.accumulate(self.model):
                    loss = self.training_loss(batch)
                    self.accelerator.backward(loss)
                    if self.accelerator.sync_gradients:
                        self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
                    self.optimizer.step()
                    self.optimizer.zero_grad()
                self.accelerator.print("loss", loss.item())
            self.evaluate()

    def training_loss(self, batch):
        with self.accelerator.autocast():
            return self.model(**batch).loss

    @torch.no_grad()
    def evaluate(self):
        self.model.eval()
        for batch in self.eval_dataloader:
            logits = self.model(**batch).logits
            logits, labels = self.accelerator.gather_for_metrics((logits, batch["labels"]))
            if self.accelerator.is_main_process:
                print("loss", torch.nn.functional.cross_entropy(logits, labels).item())
        self.accelerator.wait_for_everyone()


if __name__ == "__main__":
    set_seed(21)
    Trainer(classifier()).train(2)
