"""Evaluates over all processes, without and with the truncation by the library."""

import torch
from accelerate import Accelerator
from accelerate.utils import gather, set_seed

from tests.migration.toy import classifier, text_loaders


def evaluate(accelerator, model, eval_dataloader):
    model.eval()
    samples_seen = 0
    rows = []
    for step, batch in enumerate(eval_dataloader):
        with torch.no_grad():
            outputs = model(**batch)
        predictions = outputs.logits.argmax(dim=-1)
        predictions, references = gather((predictions, batch["labels"]))
        if accelerator.use_distributed:
            if step == len(eval_dataloader) - 1:
                predictions = predictions[: len(eval_dataloader.dataset) - samples_seen]
                references = references[: len(eval_dataloader.dataset) - samples_seen]
            else:
                samples_seen += references.shape[0]
        rows.append((predictions == references).float())
    losses = []
    for batch in eval_dataloader:
        with torch.no_grad():
            loss = model(**batch).loss
        losses.append(accelerator.gather_for_metrics(loss.repeat(len(batch["labels"]))))
    maximum = accelerator.reduce(torch.cat(losses), reduction="mean").max()
    padded = accelerator.pad_across_processes(torch.cat(losses), dim=0, pad_index=-1)
    accelerator.print("loss", torch.cat(rows).mean().item(), torch.cat(losses).mean().item())
    accelerator.print("loss", maximum.item(), padded.sum().item())


def main():
    accelerator = Accelerator()
    set_seed(6)
    train_dataloader, eval_dataloader = text_loaders(8)
    model = classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model, optimizer, train_dataloader, eval_dataloader = accelerator.prepare(
        model, optimizer, train_dataloader, eval_dataloader
    )
    for epoch in range(2):
        model.train()
        for batch in train_dataloader:
            optimizer.zero_grad()
            accelerator.backward(model(**batch).loss)
            accelerator.clip_grad_value_(model.parameters(), 0.05)
            optimizer.step()
        evaluate(accelerator, model, eval_dataloader)
    with accelerator.split_between_processes(list(range(5))) as numbers:
        accelerator.print("loss", float(sum(numbers)))


if __name__ == "__main__":
    main()
