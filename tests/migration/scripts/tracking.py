"""Logs the losses to trackers."""

import argparse
import os
import tempfile

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from tests.migration.toy import classifier, text_loaders


def main(args):
    if args.with_tracking:
        accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=args.project_dir)
    else:
        accelerator = Accelerator(cpu=True)
    set_seed(12)
    train_dataloader, eval_dataloader = text_loaders(8)
    model = classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model, optimizer, train_dataloader = accelerator.prepare(model, optimizer, train_dataloader)
    if args.with_tracking:
        accelerator.init_trackers("toy", {"lr": 0.01})
    for epoch in range(2):
        total_loss = 0
        for step, batch in enumerate(train_dataloader):
            loss = model(**batch).loss
            total_loss += loss.detach().float()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        if args.with_tracking:
            accelerator.log(
                {
                    "train_loss": total_loss.item() / len(train_dataloader),
                    "epoch": epoch,  # also a number
                },
                step=epoch,
            )
        accelerator.print("loss", total_loss.item())
    accelerator.end_training()
    files = [name for _, _, names in os.walk(args.project_dir) for name in names]
    print("loss", float(any("tfevents" in name for name in files)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--with_tracking", default=True)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as args.project_dir:
        main(args)
