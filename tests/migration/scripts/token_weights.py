"""A language model whose windows are weighted by tokens: the loop reads the batches itself."""

import contextlib
import math

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader

from tests.migration.toy import Permuted, language_model, sentences


def main(steps_per_update=3):
    accelerator = Accelerator(gradient_accumulation_steps=steps_per_update)
    set_seed(2)
    dataset = sentences(28, 0)
    dataset.columns["labels"] = dataset.columns["input_ids"].clone()
    dataset.columns["labels"][::3, :5] = -100
    train_dataloader = DataLoader(dataset, batch_size=4, sampler=Permuted(dataset))
    model = language_model()
    optimizer = torch.optim.AdamW(params=model.parameters(), lr=0.01)
    model, optimizer, train_dataloader = accelerator.prepare(model, optimizer, train_dataloader)

    num_updates = math.ceil(len(train_dataloader) / steps_per_update)
    remainder = len(train_dataloader) % steps_per_update or steps_per_update
    for epoch in range(2):
        model.train()
        train_dataloader.set_epoch(epoch)
        training_iterator = iter(train_dataloader)
        for update_step in range(num_updates):
            count = steps_per_update if update_step != num_updates - 1 else remainder
            batches = [next(training_iterator) for _ in range(count)]
            num_items = sum((batch["labels"] != -100).sum() for batch in batches)
            num_items = accelerator.gather(num_items).sum().item()
            losses = []
            for index, batch in enumerate(batches):
                is_last = index == len(batches) - 1
                sync = contextlib.nullcontext() if is_last else accelerator.no_sync(model)
                with sync:
                    logits = model(input_ids=batch["input_ids"]).logits[:, :-1].flatten(0, 1)
                    labels = batch["labels"][:, 1:].flatten()
                    loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
                    loss = loss / num_items * steps_per_update * accelerator.num_processes
                    accelerator.backward(loss)
                    losses.append(loss.detach())
            grad_norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            total = accelerator.gather(sum(losses)).sum().item()
            accelerator.print("loss", total / accelerator.num_processes / steps_per_update)
            accelerator.print("loss", grad_norm.item())
    accelerator.end_training()


if __name__ == "__main__":
    main()
