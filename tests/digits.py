"""One epoch of training of the digits example, to compare world sizes."""

import runpy

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import faccel

EXAMPLE = runpy.run_path("examples/digits.py", run_name="digits")


# In fp32 another order of summation may change the maximum of a max-pool, which a high learning
# rate amplifies: 3e-4 after 15 steps at 0.1 and 4 ranks, where fp64 differs by 7e-17.
LEARNING_RATE = 0.02


def train_epoch(ctx, shuffle, accumulate, dtype=torch.float32, global_batch=96):
    """Train one epoch; return parameters, test predictions in order, and the number of updates."""
    train_set, test_set = (
        TensorDataset(s.tensors[0].to(dtype), s.tensors[1]) for s in EXAMPLE["datasets"]()
    )
    loader = DataLoader(train_set, global_batch // accumulate, shuffle=shuffle)
    # The last global batch is the same on any number of ranks: a mean over repeats, too.
    train = faccel.shard(loader, ctx, split_batches=True, tail="full")
    faccel.seed_everything(1, ctx)
    model = faccel.wrap(EXAMPLE["Net"]().to(dtype), ctx)
    opt = faccel.wrap_optimizer(
        torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9), model, ctx
    )
    scaler, updates = faccel.init_scaler(ctx), 0
    for window in faccel.windows(train.at(3), ctx, size=accumulate):
        for micro in window:
            x, y = micro.data
            with faccel.grad_sync(model, on=micro.sync):
                scaler = faccel.scaled_backward(
                    F.cross_entropy(model(x), y), scaler, ctx, scale=micro.scale
                )
        _, scaler = faccel.optimizer_step(opt, scaler, ctx, clip_norm=1.0)
        updates += 1
    model.eval()
    seen = []
    with torch.no_grad():
        for batch in faccel.batches(faccel.shard(DataLoader(test_set, 50), ctx)):
            seen.append(
                faccel.gather(model(batch.data[0]).argmax(-1), ctx, num_valid=batch.num_valid)
            )
    assert sum(map(len, seen)) == len(test_set)
    return {name: p.detach() for name, p in model.named_parameters()}, torch.cat(seen), updates
