"""Sentence classification: the calls of a first example."""

import argparse

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import set_seed
from torch.optim.lr_scheduler import LambdaLR

from tests.migration.toy import classifier, text_loaders

LARGEST_BATCH = 8


def build_loaders(accelerator: Accelerator, batch_size: int = 16):
    with accelerator.main_process_first():
        loaders = text_loaders(batch_size)
    if accelerator.mixed_precision == "fp8":
        raise NotImplementedError
    return loaders


def train(args):
    # one line for all devices
    accelerator = Accelerator(cpu=args.cpu, mixed_precision=args.mixed_precision)
    batch_size = 16
    accumulation = 1
    if batch_size > LARGEST_BATCH and accelerator.distributed_type != DistributedType.XLA:
        accumulation = batch_size // LARGEST_BATCH
        batch_size = LARGEST_BATCH

    set_seed(42)
    train_dataloader, eval_dataloader = build_loaders(accelerator, batch_size)
    model = classifier()
    model = model.to(accelerator.device)
    optimizer = torch.optim.AdamW(params=model.parameters(), lr=5e-3)
    lr_scheduler = LambdaLR(optimizer, lambda step: 1 / (1 + step / 10))

    model, optimizer, train_dataloader, eval_dataloader, lr_scheduler = accelerator.prepare(
        model, optimizer, train_dataloader, eval_dataloader, lr_scheduler
    )

    for epoch in range(2):
        model.train()
        for step, batch in enumerate(train_dataloader):
            outputs = model(**batch)
            loss = outputs.loss
            loss = loss / accumulation
            accelerator.backward(loss)
            if step % accumulation == 0:
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
            accelerator.print("loss", loss.item())

        model.eval()
        hits = []
        for step, batch in enumerate(eval_dataloader):
            with torch.no_grad():
                outputs = model(**batch)
            predictions = outputs.logits.argmax(dim=-1)
            predictions, references = accelerator.gather_for_metrics((predictions, batch["labels"]))
            hits.append(predictions == references)
        accelerator.print("loss", 1 - torch.cat(hits).float().mean().item())
    accelerator.print("rate", lr_scheduler.get_last_lr()[0])
    accelerator.end_training()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--mixed_precision", default=None)
    parser.add_argument("--cpu", action="store_true")
    train(parser.parse_args())
