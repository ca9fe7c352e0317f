"""Direct preference optimization: a policy, a frozen reference, two answers per row."""

import argparse
import copy

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from torch.utils.data import DataLoader

from tests.migration.toy import Permuted, Rows, language_model, sentences


def sequence_logps(model, tokens):
    logits = model(input_ids=tokens).logits[:, :-1]
    logps = torch.gather(logits.log_softmax(-1), 2, tokens[:, 1:, None])
    return logps.squeeze(2).sum(-1)


def dpo_loss(policy, reference, batch, beta):
    ratios = []
    for answer in ("chosen", "rejected"):
        with torch.no_grad():
            reference_logps = sequence_logps(reference, batch[answer])
        ratios.append(sequence_logps(policy, batch[answer]) - reference_logps)
    margin = ratios[0] - ratios[1]
    return -F.logsigmoid(beta * margin).mean(), margin.detach()


def train_epoch(accelerator, policy, reference, optimizer, scheduler, loader, epoch, beta):
    for batch in loader:
        with accelerator.accumulate(policy):
            with accelerator.autocast():
                loss, margin = dpo_loss(policy, reference, batch, beta)
            accelerator.backward(loss)
            grad_norm = None
            if accelerator.sync_gradients:
                grad_norm = accelerator.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            if not accelerator.optimizer_step_was_skipped:
                scheduler.step()
            optimizer.zero_grad()
        margins = accelerator.gather_for_metrics(margin)
        mean_loss = accelerator.reduce(loss.detach(), reduction="mean")
        accelerator.print("loss", mean_loss.item(), margins.mean().item())
        if grad_norm is not None:
            accelerator.print("loss", grad_norm.item())


def main(args):
    accelerator = Accelerator(gradient_accumulation_steps=2, mixed_precision=args.mixed_precision)
    set_seed(args.seed, device_specific=False)
    chosen, rejected = sentences(22, 0).columns, sentences(22, 1).columns
    dataset = Rows(chosen=chosen["input_ids"], rejected=rejected["input_ids"])
    loader = DataLoader(dataset, batch_size=4, sampler=Permuted(dataset))
    policy = language_model()
    reference = copy.deepcopy(policy).requires_grad_(False).eval()
    optimizer = torch.optim.RMSprop(policy.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 4))
    policy, optimizer, scheduler, loader = accelerator.prepare(policy, optimizer, scheduler, loader)
    reference = accelerator.prepare_model(reference, evaluation_mode=True)
    for epoch in range(2):
        policy.train()
        train_epoch(
            accelerator=accelerator,
            policy=policy,
            reference=reference,
            optimizer=optimizer,
            scheduler=scheduler,
            loader=loader,
            epoch=epoch,
            beta=args.beta,
        )
    names = gather_object([f"process {accelerator.process_index}"])
    accelerator.print("loss", float(len(names)), scheduler.get_last_lr()[0])
    accelerator.end_training()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--mixed_precision", default="no")
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=5)
    main(parser.parse_args())
