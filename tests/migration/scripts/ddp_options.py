"""Options of DDP, and of the process group."""

import datetime

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DDPCommunicationHookType,
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    set_seed,
)

from tests.migration.toy import classifier, text_loaders

ddp_kwargs = DistributedDataParallelKwargs(
    find_unused_parameters=True, comm_hook=DDPCommunicationHookType.BF16
)
group_kwargs = InitProcessGroupKwargs(timeout=datetime.timedelta(seconds=300))
accelerator = Accelerator(kwargs_handlers=[ddp_kwargs, group_kwargs])
set_seed(1)
train_dataloader, eval_dataloader = text_loaders(8)
model = classifier()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
model, optimizer, train_dataloader = accelerator.prepare(model, optimizer, train_dataloader)
for epoch in range(2):
    for batch in train_dataloader:
        optimizer.zero_grad()
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        if accelerator.is_local_main_process:
            print("loss", loss.item())
