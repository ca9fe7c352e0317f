"""Train digits with a pure step, and return to an earlier state after a bad batch.

python examples/functional.py
faccel launch --cpu --nproc 2 examples/functional.py
"""

import torch
import torch.nn.functional as F
from digits import EPOCHS, GLOBAL_BATCH, LEARNING_RATE, SEED, Net, datasets
from torch.utils.data import DataLoader

import faccel
from faccel import func

CLIP_NORM = 1.0
POISONED = 40  # the step whose batch is all NaN


def main(ctx):
    train_set, test_set = datasets()
    train = faccel.shard(DataLoader(train_set, GLOBAL_BATCH, shuffle=True), ctx, split_batches=True)
    test = faccel.shard(DataLoader(test_set, 256), ctx)

    # The module provides the code, the state the parameters. Nothing below changes either.
    faccel.seed_everything(SEED, ctx)
    net = Net()

    def loss_fn(params, batch, generator):
        x, y = batch
        return F.cross_entropy(func.functional_call(net, params, x, generator=generator), y)

    # The optimizer is a value, too: clip, scale the rate by a cosine, PyTorch's AdamW bit for bit,
    # then average the weights.
    optimizer = func.chain(
        func.clip_by_global_norm(CLIP_NORM),
        func.scale_by_schedule(func.cosine(EPOCHS * len(train))),
        func.adamw(LEARNING_RATE),
        func.ema(0.95),
    )
    first = func.init_state(net, optimizer, ctx, seed=SEED)

    # A step takes a state and returns the next one. The state before a poisoned batch still
    # exists, so `rollback` can skip that batch.
    step = func.rollback(func.make_step(loss_fn, optimizer, ctx), keep=2)
    history = first
    for epoch, loader in train.epochs(EPOCHS):
        for number, (x, y) in enumerate(loader, epoch * len(train)):
            x = x * float("nan") if number == POISONED else x
            metrics, history = step(history, (x, y))
        faccel.print(
            f"epoch {epoch:2d}  loss {metrics['loss']:.4f}  "
            f"gradient norm {metrics['grad_norm']:.3f}",
            ctx=ctx,
        )
    state = history.state
    assert (int(first.step), int(state.step), history.num_skipped) == (
        0,
        EPOCHS * len(train) - 1,
        1,
    )

    # Evaluate the averaged weights: they are an argument of the model.
    averaged = func.ema_params(state.opt)
    hits = []
    with torch.no_grad():
        for batch in faccel.batches(test):
            x, y = batch.data
            hits.append(
                faccel.gather(
                    func.functional_call(net, averaged, x).argmax(-1) == y,
                    ctx,
                    num_valid=batch.num_valid,
                )
            )
    faccel.print(f"accuracy {torch.cat(hits).float().mean():.4f}", ctx=ctx)


if __name__ == "__main__":
    with faccel.init() as ctx:
        main(ctx)
