"""A causal language model without a trainer: accumulation, trackers, checkpoints, export."""

import argparse
import json
import logging
import math
import os
import tempfile

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import ProjectConfiguration, set_seed
from torch.utils.data import DataLoader
from transformers import default_data_collator, get_scheduler

from tests.migration.toy import Permuted, language_model, sentences

logger = get_logger(__name__)


def parse_args():
    parser = argparse.ArgumentParser()
    parser.add_argument("--per_device_batch_size", type=int, default=4)
    parser.add_argument("--learning_rate", type=float, default=0.01)
    parser.add_argument("--num_train_epochs", type=int, default=2)
    parser.add_argument("--gradient_accumulation_steps", type=int, default=3)
    parser.add_argument("--num_warmup_steps", type=int, default=2)
    parser.add_argument("--checkpointing_steps", default="2")
    parser.add_argument("--report_to", default="tensorboard")
    parser.add_argument("--with_tracking", action="store_false")
    parser.add_argument("--seed", type=int, default=17)
    return parser.parse_args()


def main(args):
    accelerator_config = ProjectConfiguration(
        project_dir=args.output_dir, logging_dir=os.path.join(args.output_dir, "logs")
    )
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=args.report_to,
        project_config=accelerator_config,
    )
    logging.basicConfig(level=logging.ERROR)
    logger.info(accelerator.state, main_process_only=False)
    if args.seed is not None:
        set_seed(args.seed)
    if accelerator.is_main_process:
        os.makedirs(args.output_dir, exist_ok=True)
    accelerator.wait_for_everyone()

    with accelerator.main_process_first():
        train_dataset, eval_dataset = sentences(44, 0), sentences(10, 1)
        for dataset in (train_dataset, eval_dataset):
            dataset.columns["labels"] = dataset.columns["input_ids"]

    train_dataloader = DataLoader(
        train_dataset,
        sampler=Permuted(train_dataset),
        collate_fn=default_data_collator,
        batch_size=args.per_device_batch_size,
    )
    eval_dataloader = DataLoader(
        eval_dataset, collate_fn=default_data_collator, batch_size=args.per_device_batch_size
    )
    model = language_model()
    # no weight decay for norms
    no_decay = ["norm.weight"]
    optimizer_grouped_parameters = [
        {
            "params": [p for n, p in model.named_parameters() if not any(d in n for d in no_decay)],
            "weight_decay": 0.1,
        },
        {
            "params": [p for n, p in model.named_parameters() if any(d in n for d in no_decay)],
            "weight_decay": 0.0,
        },
    ]
    optimizer = torch.optim.AdamW(optimizer_grouped_parameters, lr=args.learning_rate)

    num_update_steps_per_epoch = math.ceil(len(train_dataloader) / args.gradient_accumulation_steps)
    max_train_steps = args.num_train_epochs * num_update_steps_per_epoch
    lr_scheduler = get_scheduler(
        name="linear",
        optimizer=optimizer,
        num_warmup_steps=args.num_warmup_steps * accelerator.num_processes,
        num_training_steps=max_train_steps * accelerator.num_processes,
    )
    model, optimizer, train_dataloader, eval_dataloader, lr_scheduler = accelerator.prepare(
        model, optimizer, train_dataloader, eval_dataloader, lr_scheduler
    )
    checkpointing_steps = args.checkpointing_steps
    if checkpointing_steps is not None and checkpointing_steps.isdigit():
        checkpointing_steps = int(checkpointing_steps)
    if args.with_tracking:
        experiment_config = {"lr": args.learning_rate}
        accelerator.init_trackers("clm", experiment_config)

    total_batch_size = args.per_device_batch_size * accelerator.num_processes
    logger.info(f"***** {total_batch_size} rows per step *****")
    completed_steps = 0
    for epoch in range(args.num_train_epochs):
        model.train()
        if args.with_tracking:
            total_loss = 0
        for step, batch in enumerate(train_dataloader):
            with accelerator.accumulate(model):
                outputs = model(**batch)
                loss = outputs.loss
                # we keep track of the loss at each epoch
                if args.with_tracking:
                    total_loss += loss.detach().float()
                accelerator.backward(loss)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()

            # an update was made
            if accelerator.sync_gradients:
                completed_steps += 1
            accelerator.print("loss", loss.item())
            if isinstance(checkpointing_steps, int):
                if completed_steps % checkpointing_steps == 0 and accelerator.sync_gradients:
                    output_dir = os.path.join(args.output_dir, f"step_{completed_steps}")
                    accelerator.save_state(output_dir)
            if completed_steps >= max_train_steps:
                break

        model.eval()
        losses = []
        for step, batch in enumerate(eval_dataloader):
            with torch.no_grad():
                outputs = model(**batch)
            loss = outputs.loss
            losses.append(accelerator.gather_for_metrics(loss.repeat(args.per_device_batch_size)))
        losses = torch.cat(losses)
        eval_loss = torch.mean(losses)
        accelerator.print("loss", eval_loss.item(), math.exp(eval_loss), len(losses))
        if args.with_tracking:
            accelerator.log(
                {"eval_loss": eval_loss, "train_loss": total_loss.item() / len(train_dataloader)},
                step=completed_steps,
            )

    # the newest checkpoint is the present state
    newest = os.path.join(args.output_dir, f"step_{completed_steps}")
    weight = accelerator.unwrap_model(model).lm_head.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight.zero_()
    accelerator.load_state(newest)
    accelerator.print("loss", (weight - before).abs().max().item())

    accelerator.wait_for_everyone()
    unwrapped_model = accelerator.unwrap_model(model)
    unwrapped_model.save_pretrained(
        args.output_dir,
        is_main_process=accelerator.is_main_process,
        save_function=accelerator.save,
    )
    if accelerator.is_main_process:
        with open(os.path.join(args.output_dir, "all_results.json"), "w") as f:
            json.dump({"loss": eval_loss.item()}, f)
    accelerator.end_training()
    files = os.listdir(args.output_dir)
    print("loss", float("model.safetensors" in files), float("config.json" in files))


if __name__ == "__main__":
    args = parse_args()
    with tempfile.TemporaryDirectory() as args.output_dir:
        main(args)
