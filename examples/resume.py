"""Stop a run at any step, by SIGTERM or after N steps, and resume it bit for bit.

python examples/resume.py runs/resume --stop-after 7; python examples/resume.py runs/resume
torchrun --nproc-per-node 2 examples/resume.py runs/resume
"""

import argparse
import hashlib
import sys

import torch
import torch.nn.functional as F
from arguments import count
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Dataset

import faccel

EPOCHS = 2
NUM_IMAGES = 640
GLOBAL_BATCH = 64  # images per micro-batch over all processes
ACCUMULATE = 2  # micro-batches per update
SAVE_EVERY = 5  # updates
LEARNING_RATE = 0.05


class Digits(Dataset):
    """Digits with random shifts and noise, which are the same in every run and in every worker."""

    def __init__(self):
        images, self.labels = load_digits(return_X_y=True)
        self.images = torch.tensor(images, dtype=torch.float32).view(-1, 8, 8) / 16

    def __len__(self):
        return NUM_IMAGES

    def __getitem__(self, index):
        shift = int(torch.randint(-1, 2, ()))
        image = self.images[index].roll(shift, 1) + 0.05 * torch.randn(8, 8)
        return image, int(self.labels[index])


def net():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 10)
    )


def digest(model):
    """Return a hash of all bits of the parameters."""
    values = [param.detach().cpu().numpy().tobytes() for param in model.parameters()]
    return hashlib.sha256(b"".join(values)).hexdigest()[:16]


def main(ctx, folder, stop_after=None, workers=2):
    """Train; return the digest of the model, or None if the run was stopped before its end."""
    preemption = faccel.preemption(ctx)  # SIGTERM and SIGUSR1 set a flag
    loader = DataLoader(Digits(), GLOBAL_BATCH, shuffle=True, num_workers=workers)
    train = faccel.shard(loader, ctx, split_batches=True)

    faccel.seed_everything(0, ctx)
    model = faccel.wrap(net(), ctx)
    opt = faccel.wrap_optimizer(torch.optim.AdamW(model.parameters(), LEARNING_RATE), model, ctx)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 20)
    faccel.seed_everything(0, ctx, per_data_rank=True)  # each rank draws different dropout masks

    # Everything that the run depends on. `load` takes the newest valid checkpoint.
    state = {"model": model, "opt": opt, "schedule": schedule, "scaler": faccel.init_scaler(ctx)}
    state |= {"cursor": faccel.Cursor(), "rng": faccel.rng_state(ctx), "step": 0}
    if faccel.latest(folder, ctx):
        state = faccel.load(state, folder, ctx)
        faccel.print(f"resumed after step {state['step']}", ctx=ctx)
    scaler, step = state["scaler"], state["step"]
    faccel.set_rng_state(state["rng"])

    is_due = faccel.checkpoint.every_steps(SAVE_EVERY) | faccel.checkpoint.on_preemption()
    for _, epoch_loader in train.epochs(EPOCHS, start=state["cursor"]):
        for window in faccel.windows(epoch_loader, ctx, size=ACCUMULATE):
            for micro in window:
                x, y = micro.data
                with faccel.grad_sync(model, on=micro.sync):
                    loss = F.cross_entropy(model(x), y)
                    scaler = faccel.scaled_backward(loss, scaler, ctx, scale=micro.scale)
            _, scaler = faccel.optimizer_step(opt, scaler, ctx, scheduler=schedule)
            step += 1

            # All ranks stop at the same step, even if the signal arrives at different times.
            should_stop = preemption.requested or step == stop_after
            should_stop = faccel.agree(ctx, stop=should_stop).stop
            if is_due(faccel.checkpoint.SaveEvent(step, preempted=should_stop)):
                state |= {"scaler": scaler, "cursor": window.cursor, "step": step}
                state |= {"rng": faccel.rng_state(ctx)}
                faccel.save(state, folder, ctx, step=step, keep=2, background=not should_stop)
            if should_stop:
                return None
    return digest(model)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder")
    parser.add_argument("--stop-after", type=count, metavar="N")
    args = parser.parse_args()
    with faccel.init() as ctx:
        result = main(ctx, args.folder, args.stop_after)
        if result is not None:
            faccel.print(f"digest {result}", ctx=ctx)
        else:
            faccel.print("stopped", ctx=ctx)
    if result is None:
        sys.exit(faccel.checkpoint.Preemption.exit_code)  # 75: run the same command again
