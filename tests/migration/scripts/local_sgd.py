"""Synchronizes parameters every few steps."""

import torch
from accelerate import Accelerator
from accelerate.local_sgd import LocalSGD
from accelerate.utils import set_seed

from tests.migration.toy import classifier, text_loaders

accelerator = Accelerator(gradient_accumulation_steps=2)
set_seed(4)
train_dataloader, eval_dataloader = text_loaders(8)
model = classifier()
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
model, optimizer, train_dataloader = accelerator.prepare(model, optimizer, train_dataloader)
for epoch in range(1):
    with LocalSGD(accelerator=accelerator, model=model, local_sgd_steps=4, enabled=True) as local:
        for step, batch in enumerate(train_dataloader):
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                local.step()
            accelerator.print("loss", loss.item())
