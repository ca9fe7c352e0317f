"""Time of `forward_backward` beside the loop that it replaces, on one process.

A window of 4 micro-batches takes about 1 ms of computation, so the overhead of the function shows.
The loops are alternated, with the same model and the same batches. Times are those of the CPU.

python benchmarks/forward_backward.py
"""

import time

import torch
import torch.nn.functional as F
from measure import alternate, ratios, report, spread, table, target
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import faccel

NUM_FEATURES = 32
BATCH_SIZE = 8
SIZE = 4  # micro-batches of a window
NUM_WINDOWS = 20  # per round and contender
ROUNDS = 200


def loss_fn(model, batch):
    x, y = batch.data
    return F.cross_entropy(model(x), y)


def setup():
    torch.manual_seed(0)
    ctx = faccel.init(device="cpu")
    layers = [nn.Linear(NUM_FEATURES, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()]
    model = faccel.wrap(nn.Sequential(*layers, nn.Linear(64, 2)), ctx)
    x = torch.randn(NUM_WINDOWS * SIZE * BATCH_SIZE, NUM_FEATURES)
    loader = faccel.shard(DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), BATCH_SIZE), ctx)
    opt = faccel.wrap_optimizer(torch.optim.SGD(model.parameters(), lr=1e-3), model, ctx)
    return ctx, model, loader, opt


def by_hand():
    ctx, model, loader, opt = setup()

    def epoch():
        scaler = faccel.init_scaler(ctx)
        for window in faccel.windows(loader, ctx, size=SIZE):
            losses = []
            for micro in window:
                with faccel.grad_sync(model, on=micro.sync):
                    loss = loss_fn(model, micro)
                    scaler = faccel.scaled_backward(loss, scaler, ctx, scale=micro.scale)
                losses.append(loss.detach())
            torch.stack(losses)
            _, scaler = faccel.optimizer_step(opt, scaler, ctx)

    return epoch


def with_one_function(**policy):
    ctx, model, loader, opt = setup()

    def epoch():
        scaler = faccel.init_scaler(ctx)
        for window in faccel.windows(loader, ctx, size=SIZE):
            _, scaler = faccel.forward_backward(loss_fn, model, window, scaler, ctx, **policy)
            _, scaler = faccel.optimizer_step(opt, scaler, ctx)

    return epoch


if __name__ == "__main__":
    torch.set_num_threads(1)
    contenders = {
        "by hand": by_hand(),
        "forward_backward": with_one_function(),
        "with retry": with_one_function(retry=faccel.Retry()),
    }
    seconds = alternate(contenders, ROUNDS, clock=time.process_time)
    rows = table("time per window", seconds, "by hand", calls=NUM_WINDOWS)
    ratio = spread(ratios(seconds, "forward_backward", "by hand"))["median"]
    ratio_with_retry = spread(ratios(seconds, "with retry", "by hand"))["median"]
    report(
        "forward_backward",
        {"batch_size": BATCH_SIZE, "windows_per_round": NUM_WINDOWS, "rounds": ROUNDS},
        {"one process": rows},
        [
            target("forward_backward / by hand", ratio, at_most=1.02),
            target("with retry / by hand", ratio_with_retry, at_most=1.1),
        ],
    )
