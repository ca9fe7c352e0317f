"""An optimizer with two modes."""

import schedulefree
from accelerate import Accelerator
from accelerate.utils import set_seed

from tests.migration.toy import classifier, text_loaders


def main():
    accelerator = Accelerator(mixed_precision="no")
    set_seed(8)
    train_dataloader, eval_dataloader = text_loaders(8)
    model = classifier()
    optimizer = schedulefree.AdamWScheduleFree(model.parameters(), lr=0.02, warmup_steps=2)
    model, optimizer, train_dataloader, eval_dataloader = accelerator.prepare(
        model, optimizer, train_dataloader, eval_dataloader
    )
    for epoch in range(2):
        model.train()
        optimizer.train()
        for step, batch in enumerate(train_dataloader):
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            accelerator.print("loss", loss.item())
        model.eval()
        optimizer.eval()
        for batch in eval_dataloader:
            loss = accelerator.gather_for_metrics(model(**batch).loss.detach())
            accelerator.print("loss", loss.item())
    accelerator.end_training()


if __name__ == "__main__":
    main()
