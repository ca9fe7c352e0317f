"""A smaller batch size with more micro-batches, until one fits."""

import torch
from accelerate import Accelerator
from accelerate.utils import find_executable_batch_size, set_seed

from tests.migration.toy import classifier, text_loaders


def main():
    accelerator = Accelerator(cpu=True)
    observed_batch_size = 16

    @find_executable_batch_size(starting_batch_size=observed_batch_size)
    def inner_training_loop(batch_size):
        nonlocal accelerator
        num_micro_batches = observed_batch_size // batch_size
        accelerator.gradient_accumulation_steps = num_micro_batches
        accelerator.free_memory()
        set_seed(9)
        model = classifier()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        train_dataloader, eval_dataloader = text_loaders(batch_size)
        model, optimizer, train_dataloader, eval_dataloader = accelerator.prepare(
            model, optimizer, train_dataloader, eval_dataloader
        )
        for epoch in range(2):
            model.train()
            for step, batch in enumerate(train_dataloader):
                with accelerator.accumulate(model):
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
