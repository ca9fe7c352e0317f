"""Searches the largest batch size, from within a function."""

import torch
from accelerate import Accelerator
from accelerate.utils import find_executable_batch_size, set_seed

from tests.migration.toy import classifier, text_loaders


def main():
    accelerator = Accelerator()

    @find_executable_batch_size(starting_batch_size=16)
    def inner_training_loop(batch_size):
        nonlocal accelerator
        # what an attempt before has left
        accelerator.free_memory()
        set_seed(9)
        model = classifier()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        train_dataloader, eval_dataloader = text_loaders(batch_size)
        model, optimizer, train_dataloader = accelerator.prepare(model, optimizer, train_dataloader)
        for epoch in range(2):
            for step, batch in enumerate(train_dataloader):
                if len(batch["labels"]) > 8:
                    raise RuntimeError("CUDA out of memory.")
                loss = model(**batch).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                accelerator.print("loss", loss.item(), batch_size)

    inner_training_loop()
    accelerator.end_training()


if __name__ == "__main__":
    main()
