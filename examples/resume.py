"""Stop a run anywhere, with Ctrl-C's polite brother SIGTERM or after N steps, and go on bit for bit.

python examples/resume.py runs/resume --stop-after 7; python examples/resume.py runs/resume
torchrun --nproc-per-node 2 examples/resume.py runs/resume
"""

import argparse
import hashlib
import sys

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Dataset

import faccel

EPOCHS = 2
GLOBAL_BATCH = 64  # images per micro-batch over all processes
ACCUMULATE = 2  # micro-batches per update
LEARNING_RATE = 0.05


class Digits(Dataset):
    """Digits that are shifted and made noisy at random: the same in every run, whoever reads them."""

    def __init__(self):
        images, self.labels = load_digits(return_X_y=True)
        self.images = torch.tensor(images, dtype=torch.float32).view(-1, 8, 8) / 16

    def __len__(self):
        return 640

    def __getitem__(self, i):
        shift = int(torch.randint(-1, 2, ()))
        return self.images[i].roll(shift, 1) + 0.05 * torch.randn(8, 8), int(self.labels[i])


def net():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 10)
    )


def digest(model):
    """A name for the parameters, down to the last bit."""
    parts = [p.detach().cpu().numpy().tobytes() for p in model.parameters()]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def main(ctx, folder, stop_after=None, workers=2):
    """Train; return the digest, or None where the run was stopped before its end."""
    told = faccel.preemption(ctx)  # SIGTERM and SIGUSR1 set a flag, nothing else
    loader = DataLoader(Digits(), GLOBAL_BATCH, shuffle=True, num_workers=workers)
    train = faccel.shard(loader, ctx, split_batches=True)

    faccel.seed_everything(0, ctx)
    model = faccel.wrap(net(), ctx)
    opt = faccel.wrap_optimizer(torch.optim.AdamW(model.parameters(), LEARNING_RATE), model, ctx)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 20)
    faccel.seed_everything(
        0, ctx, per_data_rank=True
    )  # from here on every rank has a dropout of its own

    state = {
        "model": model,
        "opt": opt,
        "schedule": schedule,
        "scaler": faccel.init_scaler(ctx),
        "cursor": faccel.Cursor(),
        "rng": faccel.rng_state(ctx),
        "step": 0,
    }
    if faccel.latest(folder, ctx):
        state = faccel.load(state, folder, ctx)  # the newest valid one; any number of processes
        faccel.print(f"going on after step {state['step']}", ctx=ctx)
    scaler, step = state["scaler"], state["step"]
    faccel.set_rng_state(state["rng"])

    due = faccel.checkpoint.every_steps(5) | faccel.checkpoint.on_preemption()
    for _, batches in train.epochs(EPOCHS, start=state["cursor"]):
        for window in faccel.windows(batches, ctx, size=ACCUMULATE):
            for micro in window:
                x, y = micro.data
                with faccel.grad_sync(model, on=micro.sync):
                    loss = F.cross_entropy(model(x), y)
                    scaler = faccel.scaled_backward(loss, scaler, ctx, scale=micro.scale)
            _, scaler = faccel.optimizer_step(opt, scaler, ctx, scheduler=schedule)
            step += 1

            stop = faccel.agree(
                ctx, now=told.requested or step == stop_after
            ).now  # at one step, on all ranks
            if due(faccel.checkpoint.SaveEvent(step, preempted=stop)):
                new = {
                    "scaler": scaler,
                    "cursor": window.cursor,
                    "rng": faccel.rng_state(ctx),
                    "step": step,
                }
                faccel.save(state | new, folder, ctx, step=step, keep=2, background=not stop)
            if stop:
                return None
    return digest(model)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder")
    parser.add_argument("--stop-after", type=int, metavar="N")
    args = parser.parse_args()
    with faccel.init() as ctx:
        result = main(ctx, args.folder, args.stop_after)
        faccel.print(f"digest {result}" if result else "stopped", ctx=ctx)
    sys.exit(
        0 if result else faccel.checkpoint.Preemption.exit_code
    )  # 75: run the same command again
