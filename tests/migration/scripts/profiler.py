"""Profiles some steps."""

import torch
from accelerate import Accelerator, ProfileKwargs
from accelerate.utils import set_seed

from tests.migration.toy import classifier, text_loaders

profile_kwargs = ProfileKwargs(activities=["cpu"], record_shapes=True)
accelerator = Accelerator(kwargs_handlers=[profile_kwargs])
set_seed(4)
train_dataloader, eval_dataloader = text_loaders(8)
model = classifier()
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
model, optimizer, train_dataloader = accelerator.prepare(model, optimizer, train_dataloader)
for epoch in range(1):
    with accelerator.profile() as prof:
        for step, batch in enumerate(train_dataloader):
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            accelerator.print("loss", loss.item())
    accelerator.print(len(prof.key_averages()) > 0)
