"""Image classification with a cyclic learning rate; one shuffled batch per epoch."""

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader

from tests.migration.toy import convnet, digits


def train(config, args):
    accelerator = Accelerator(cpu=args.cpu, mixed_precision=args.mixed_precision)
    set_seed(config["seed"])
    data = digits(160)
    train_split, eval_split = torch.utils.data.random_split(data, [120, 40])
    train_dataloader = DataLoader(train_split, shuffle=True, batch_size=config["batch_size"])
    eval_dataloader = DataLoader(eval_split, shuffle=False, batch_size=config["batch_size"])

    model = convnet()
    model = model.to(accelerator.device)
    for param in model[0].parameters():
        param.requires_grad = False
    mean = torch.tensor(0.3)[None, None, None].to(accelerator.device)

    optimizer = torch.optim.Adam(params=model.parameters(), lr=config["lr"] / 25)
    lr_scheduler = OneCycleLR(
        optimizer=optimizer, max_lr=config["lr"], epochs=4, steps_per_epoch=len(train_dataloader)
    )
    model, optimizer, train_dataloader, eval_dataloader, lr_scheduler = accelerator.prepare(
        model, optimizer, train_dataloader, eval_dataloader, lr_scheduler
    )

    for epoch in range(4):
        model.train()
        for step, batch in enumerate(train_dataloader):
            inputs, labels = (tensor.to(accelerator.device) for tensor in batch)
            outputs = model(inputs - mean)
            loss = torch.nn.functional.cross_entropy(outputs, labels)
            accelerator.backward(loss)
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
            accelerator.print("loss", loss.item())

    model.eval()
    accurate = 0
    num_elems = 0
    for inputs, labels in eval_dataloader:
        with torch.no_grad():
            outputs = model(inputs - mean)
        predictions, references = accelerator.gather_for_metrics((outputs.argmax(-1), labels))
        hits = predictions == references
        num_elems += hits.shape[0]
        accurate += hits.long().sum()
    accelerator.print("loss", 1 - accurate.item() / num_elems)
    accelerator.end_training()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--mixed_precision", default=None)
    parser.add_argument("--cpu", action="store_true")
    train({"lr": 0.03, "seed": 7, "batch_size": 128}, parser.parse_args())
