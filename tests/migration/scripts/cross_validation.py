"""Folds: each has its model, and all predict the test rows."""

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import DataLoader, Subset

from tests.migration.toy import convnet, digits


def get_fold_dataloaders(accelerator, dataset, train_rows, valid_rows, batch_size=16):
    with accelerator.main_process_first():
        train_set, valid_set = Subset(dataset, train_rows), Subset(dataset, valid_rows)
    return (
        DataLoader(train_set, batch_size=batch_size, generator=torch.Generator()),
        DataLoader(valid_set, batch_size=batch_size),
        DataLoader(Subset(dataset, range(90, 101)), batch_size=batch_size),
    )


def main():
    accelerator = Accelerator()
    set_seed(5)
    dataset = digits(101)
    test_predictions = []
    for fold in range(3):
        valid_rows = list(range(30 * fold, 30 * fold + 30))
        train_rows = [row for row in range(90) if row not in valid_rows]
        train_dataloader, eval_dataloader, test_dataloader = get_fold_dataloaders(
            accelerator, dataset, train_rows, valid_rows
        )
        model = convnet()
        model = model.to(accelerator.device)
        optimizer = torch.optim.AdamW(params=model.parameters(), lr=0.01)
        lr_scheduler = LinearLR(optimizer, total_iters=8)
        model, optimizer, train_dataloader, eval_dataloader, lr_scheduler = accelerator.prepare(
            model, optimizer, train_dataloader, eval_dataloader, lr_scheduler
        )

        for epoch in range(2):
            model.train()
            for images, labels in train_dataloader:
                loss = torch.nn.functional.cross_entropy(model(images), labels)
                accelerator.backward(loss)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
            accelerator.print("loss", loss.item())

        model.eval()
        fold_predictions = []
        for step, batch in enumerate(test_dataloader):
            with torch.no_grad():
                outputs = model(batch[0].to(accelerator.device))
            fold_predictions.append(accelerator.gather_for_metrics(outputs))
        test_predictions.append(torch.cat(fold_predictions))
        # the next fold starts from nothing
        model, optimizer = accelerator.free_memory(model, optimizer)

    average = torch.stack(test_predictions).mean(0)
    accelerator.print("loss", average.square().mean().item(), len(average))
    accelerator.end_training()


if __name__ == "__main__":
    main()
