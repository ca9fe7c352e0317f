"""Gradient accumulation by the library, with a short last window."""

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.optim.lr_scheduler import StepLR

from tests.migration.toy import classifier, text_loaders


def main(args):
    accelerator = Accelerator(
        cpu=True, gradient_accumulation_steps=args.gradient_accumulation_steps
    )
    set_seed(0)
    train_dataloader, eval_dataloader = text_loaders(8)
    model = classifier()
    optimizer = torch.optim.AdamW(params=model.parameters(), lr=0.01)
    scheduler = StepLR(optimizer, 2, 0.5)
    model, optimizer, train_dataloader, eval_dataloader, scheduler = accelerator.prepare(
        model, optimizer, train_dataloader, eval_dataloader, scheduler
    )
    num_updates = 0
    for epoch in range(2):
        model.train()
        for step, batch in enumerate(train_dataloader):
            with accelerator.accumulate(model):
                output = model(**batch)
                loss = output.loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), max_norm=0.5)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                num_updates += 1
            print("loss", loss.item())
            if step == 100:
                break

        model.eval()
        for step, batch in enumerate(eval_dataloader):
            with torch.no_grad():
                outputs = model(**batch)
            logits, labels = accelerator.gather_for_metrics((outputs.logits, batch["labels"]))
            print("loss", torch.nn.functional.cross_entropy(logits, labels).item())
    print("loss", float(num_updates), scheduler.get_last_lr()[0])


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--gradient_accumulation_steps", type=int, default=4)
    main(parser.parse_args())
