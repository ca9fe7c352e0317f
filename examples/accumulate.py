"""Accumulate gradients of a language model so that every token counts once.

python examples/accumulate.py
torchrun --nproc-per-node 2 examples/accumulate.py
"""

from pydoc_data.topics import topics  # English text that is part of every Python

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

import faccel

EPOCHS = 40
GLOBAL_BATCH = 8  # lines per micro-batch over all processes
ACCUMULATE = 2  # micro-batches per update
LEARNING_RATE = 1e-2
WIDTH = 48
PAD = -100  # label of a position that is not a token


def lines():
    text = topics["assert"] + topics["del"] + topics["pass"]
    stripped = [line.strip() for line in text.splitlines()]
    return [line for line in stripped if len(line) > 1]


def collate(batch):
    """Return characters and the next characters; short lines are padded with labels `PAD`."""
    codes = [torch.tensor(list(line.encode())) for line in batch]
    x = nn.utils.rnn.pad_sequence([line[:-1] for line in codes], batch_first=True)
    labels = nn.utils.rnn.pad_sequence(
        [line[1:] for line in codes], batch_first=True, padding_value=PAD
    )
    return {"x": x, "labels": labels}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(256, WIDTH)
        self.rnn = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.out = nn.Linear(WIDTH, 256)

    def forward(self, x):
        return self.out(self.rnn(self.embed(x))[0])


def num_tokens(batch):
    """Count the tokens of a micro-batch, without the rows that pad the last step."""
    return (batch.data["labels"][: batch.num_valid] != PAD).sum()


def summed_loss(model, batch):
    logits = model(batch.data["x"])[: batch.num_valid]
    labels = batch.data["labels"][: batch.num_valid]
    return F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=PAD, reduction="sum"
    )


def main(ctx):
    loader = DataLoader(lines(), GLOBAL_BATCH, shuffle=True, collate_fn=collate)
    train = faccel.shard(loader, ctx, split_batches=True)
    faccel.seed_everything(0, ctx)
    model = faccel.wrap(Model(), ctx)
    opt = faccel.wrap_optimizer(torch.optim.Adam(model.parameters(), lr=LEARNING_RATE), model, ctx)
    scaler = faccel.init_scaler(ctx)

    for epoch, epoch_loader in train.epochs(EPOCHS):
        sums = torch.zeros(2, dtype=torch.float64)  # loss and tokens of this epoch and rank
        for window in faccel.windows(epoch_loader, ctx, size=ACCUMULATE, weight=num_tokens):
            # Gradients are reduced once per update. They are those of the mean over all tokens of
            # the window, on all ranks.
            losses, scaler = faccel.forward_backward(summed_loss, model, window, scaler, ctx)
            sums += torch.stack([losses.sum(), sum(map(num_tokens, window.batches))])
            _, scaler = faccel.optimizer_step(opt, scaler, ctx, clip_norm=1.0)
        total, tokens = faccel.reduce(sums, ctx).tolist()
        if epoch % 10 == 9:
            faccel.print(f"epoch {epoch:2d}  loss per token {total / tokens:.4f}", ctx=ctx)
    faccel.print(f"loss {total / tokens:.4f}", ctx=ctx)


if __name__ == "__main__":
    with faccel.init() as ctx:
        main(ctx)
