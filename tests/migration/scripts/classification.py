"""Sequence classification without a trainer: epochs, resuming, a metric, export of the model."""

import argparse
import os
import tempfile

import accelerate
import torch
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from transformers import get_scheduler

from tests.migration.toy import Permuted, classifier, sentences


def main(args, num_epochs):
    acc = (
        accelerate.Accelerator(log_with=args.report_to, project_dir=args.output_dir)
        if args.with_tracking
        else accelerate.Accelerator()
    )
    set_seed(args.seed)
    train_dataset, eval_dataset = sentences(40, 0), sentences(21, 1)
    train_dataloader = DataLoader(
        train_dataset,
        sampler=Permuted(train_dataset),
        batch_size=8,
        generator=torch.Generator(),
    )
    eval_dataloader = DataLoader(eval_dataset, batch_size=8, generator=torch.Generator())
    model = classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    max_train_steps = 3 * len(train_dataloader)
    lr_scheduler = get_scheduler(
        name="cosine",
        optimizer=optimizer,
        num_warmup_steps=2,
        num_training_steps=max_train_steps,
    )
    model, optimizer, train_dataloader, eval_dataloader, lr_scheduler = acc.prepare(
        model, optimizer, train_dataloader, eval_dataloader, lr_scheduler
    )
    if args.with_tracking:
        acc.init_trackers("classification", vars(args))

    starting_epoch = 0
    if args.resume_from_checkpoint:
        acc.load_state(args.resume_from_checkpoint)
        starting_epoch = int(args.resume_from_checkpoint.rpartition("epoch_")[2]) + 1
    for epoch in range(starting_epoch, num_epochs):
        model.train()
        train_dataloader.set_epoch(epoch)
        for step, batch in enumerate(train_dataloader):
            outputs = model(**batch)
            loss = outputs.loss
            loss = loss / args.gradient_accumulation_steps
            acc.backward(loss)
            is_last = step == len(train_dataloader) - 1
            if step % args.gradient_accumulation_steps == 0 or is_last:
                if args.max_grad_norm is not None:
                    acc.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
            acc.print("loss", loss.item())

        model.eval()
        samples_seen = 0
        hits = 0
        for batch in eval_dataloader:
            with torch.no_grad():
                outputs = model(**batch)
            predictions, references = acc.gather_for_metrics(
                (outputs.logits.argmax(dim=-1), batch["labels"])
            )
            hits += (predictions == references).sum().item()
            samples_seen += len(references)
        acc.print("loss", hits / samples_seen, samples_seen)
        if args.with_tracking:
            acc.log({"accuracy": hits / samples_seen}, step=epoch)
        output_dir = os.path.join(args.output_dir, f"epoch_{epoch}")
        acc.save_state(output_dir)

    acc.save_model(model, os.path.join(args.output_dir, "final"), max_shard_size="1GB")
    files = os.listdir(os.path.join(args.output_dir, "final"))
    acc.print("loss", float("model.safetensors" in files))
    acc.end_training()
    return output_dir


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--with_tracking", default=True)
    parser.add_argument("--report_to", default="tensorboard")
    parser.add_argument("--seed", type=int, default=31)
    parser.add_argument("--max_grad_norm", type=float, default=0.5)
    parser.add_argument("--gradient_accumulation_steps", type=int, default=2)
    parser.add_argument("--resume_from_checkpoint", default=None)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as args.output_dir:
        main(args, 3)
        # the last epoch once more, from the checkpoint after the second one
        args.resume_from_checkpoint = os.path.join(args.output_dir, "epoch_1")
        main(args, 3)
