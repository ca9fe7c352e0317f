"""Saves the state, continues in the middle of an epoch, and skips what was read."""

import argparse
import os
import tempfile

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import set_seed
from torch.optim.lr_scheduler import StepLR

from tests.migration.toy import classifier, text_loaders


class Counter:
    """Any object with a state."""

    def __init__(self):
        self.count = 0

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


def train(args, stop_at=None):
    loader_config = DataLoaderConfiguration(use_stateful_dataloader=False)
    accelerator = Accelerator(cpu=args.cpu, dataloader_config=loader_config)
    set_seed(11)
    train_dataloader, eval_dataloader = text_loaders(8)
    model = classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    lr_scheduler = StepLR(optimizer, step_size=2, gamma=0.9)
    counter = Counter()
    accelerator.register_for_checkpointing(counter)
    model, optimizer, train_dataloader, eval_dataloader, lr_scheduler = accelerator.prepare(
        model, optimizer, train_dataloader, eval_dataloader, lr_scheduler
    )

    overall_step = 0
    starting_epoch = 0
    resume_step = None
    if args.resume_from:
        accelerator.print(f"resuming from {os.path.basename(args.resume_from)}")
        accelerator.load_state(args.resume_from)
        overall_step = int(os.path.basename(args.resume_from).replace("step_", ""))
        starting_epoch = overall_step // len(train_dataloader)
        resume_step = overall_step - starting_epoch * len(train_dataloader)
        accelerator.print("loss", float(counter.count))

    for epoch in range(starting_epoch, 3):
        model.train()
        train_dataloader.set_epoch(epoch)
        if args.resume_from and epoch == starting_epoch and resume_step is not None:
            active_dataloader = accelerator.skip_first_batches(train_dataloader, resume_step)
        else:
            active_dataloader = train_dataloader
        for step, batch in enumerate(active_dataloader):
            outputs = model(**batch)
            loss = outputs.loss
            accelerator.backward(loss)
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
            overall_step += 1
            counter.count += 1
            accelerator.print("loss", loss.item())
            if overall_step == stop_at:
                output_dir = os.path.join(args.output_dir, f"step_{overall_step}")
                accelerator.save_state(output_dir)
                return output_dir
    accelerator.end_training()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--output_dir", default=None)
    parser.add_argument("--resume_from", default=None)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as args.output_dir:
        args.resume_from = train(args, stop_at=8)
        train(args)
