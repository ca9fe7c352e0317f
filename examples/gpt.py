"""A GPT as Megatron-LM trains it: tensor, sequence, pipeline and data parallel, on any mesh.

    python examples/gpt.py --steps 20
    faccel launch --cpu --nproc 2 --mesh tp=2 examples/gpt.py --steps 20 --sequence-parallel
    faccel launch --cpu --nproc 4 --mesh pp=2,tp=2 examples/gpt.py --steps 20
    faccel launch --cpu --nproc 8 --mesh tp=2,pp=2,dp_shard=2 --mixed-precision bf16 examples/gpt.py

`--runs DIR` saves checkpoints there, and resumes from the newest on any mesh. On a mesh of
`dp_replicate` alone, optimizer states are sharded (ZeRO-1); `dp_shard` also shards parameters.
docs/coming-from-megatron.md lists the flags of Megatron-LM and what they are here.
"""

import argparse
import math
from itertools import chain

import torch
from arguments import count
from characters import Text
from gpt_model import GPT, tensor_styles
from torch.utils.data import DataLoader

import faccel

MICRO_BATCH = 8  # sequences over all ranks that read different data
ACCUMULATE = 4  # micro-batches per update without `--grad-accum`; "1f1b": at least one per stage
LEARNING_RATE, MIN_LEARNING_RATE, WARMUP, DECAY_STEPS = 3e-3, 3e-4, 5, 200
WEIGHT_DECAY, CLIP_NORM = 0.1, 1.0
SAVE_EVERY = 10  # updates


def plan_of(args, config):
    """Return how the mesh splits the model; parts for axes that the mesh lacks have no effect."""
    base = config.plan or faccel.Plan()  # of a configuration file
    checkpoint = "full" if args.activation_checkpoint else base.activation_checkpoint
    stages = faccel.parallel.PipelineConfig(chain=("embed", "blocks.*", "head"), schedule="1f1b")
    return faccel.Plan(
        fsdp=base.fsdp,
        tensor=tensor_styles(args.positions, sequence_parallel=args.sequence_parallel),
        pipeline=stages,
        ddp=faccel.parallel.DdpConfig(shard_optimizer=True),  # ZeRO-1
        activation_checkpoint=checkpoint,
    )


def learning_rate(step):
    """Return the factor of the learning rate: linear warmup, then a cosine to the minimum."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    progress = min(1.0, (step - WARMUP) / (DECAY_STEPS - WARMUP))
    low = MIN_LEARNING_RATE / LEARNING_RATE
    return low + (1 - low) * (1 + math.cos(math.pi * progress)) / 2


def train(ctx, args):
    """Return the loss of the last update, a mean over all ranks, and its gradient norm."""
    faccel.print(f"mesh {ctx.mesh.spec}", ctx=ctx)
    loader = DataLoader(Text(), MICRO_BATCH, shuffle=True, drop_last=True)
    loader = faccel.shard(loader, ctx, split_batches=True)
    faccel.seed_everything(0, ctx)
    net = GPT(rotary=args.positions == "rotary", tied=args.tied, depth=args.layers)
    net = net.to(getattr(torch, args.dtype))
    model = faccel.wrap(net, ctx, plan=plan_of(args, ctx.config))

    # Biases and norms are not decayed.
    params = list(model.parameters())
    groups = [{"params": [param for param in params if param.ndim > 1]}]
    groups += [{"params": [param for param in params if param.ndim == 1], "weight_decay": 0.0}]
    opt = torch.optim.AdamW(groups, LEARNING_RATE, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY)
    opt = faccel.wrap_optimizer(opt, model, ctx)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, learning_rate)

    state = {"model": model, "opt": opt, "schedule": schedule, "scaler": faccel.init_scaler(ctx)}
    state |= {"cursor": faccel.Cursor(), "step": 0}
    if args.runs and faccel.latest(args.runs, ctx):
        state = faccel.load(state, args.runs, ctx)
        faccel.print(f"resumed after step {state['step']}", ctx=ctx)
    scaler, step = state["scaler"], state["step"]
    if step >= args.steps:
        got = f"--steps {args.steps}, and {step} are done"
        raise faccel.errors.ConfigError("no update is left", got=got, fix="pass a larger --steps")

    def loss_fn(model, batch):
        logits = model(batch.data[:, :-1])
        return faccel.parallel.cross_entropy(logits, batch.data[:, 1:], ctx)

    size = ctx.config.grad_accum if ctx.config.sources["grad_accum"] != "default" else ACCUMULATE
    epochs = loader.epochs(10**6, start=state["cursor"])
    for window in chain.from_iterable(faccel.windows(part, ctx, size=size) for _, part in epochs):
        losses, scaler = faccel.forward_backward(loss_fn, model, window, scaler, ctx)
        info, scaler = faccel.optimizer_step(
            opt, scaler, ctx, clip_norm=CLIP_NORM, scheduler=schedule
        )
        step += 1
        if args.runs and (step % SAVE_EVERY == 0 or step == args.steps):
            state |= {"scaler": scaler, "cursor": window.cursor, "step": step}
            faccel.save(state, args.runs, ctx, step=step, keep=2)
        if step >= args.steps:
            break
    return faccel.reduce(losses.mean(), ctx, op="mean").item(), info.grad_norm.item()


def parse(words=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=count, default=50)
    parser.add_argument("--layers", type=count, default=4)
    parser.add_argument("--positions", choices=("rotary", "learned"), default="rotary")
    parser.add_argument("--tied", action="store_true", help="the head has the embedding's weight")
    parser.add_argument("--sequence-parallel", action="store_true")
    parser.add_argument("--activation-checkpoint", action="store_true")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--runs", help="directory of checkpoints")
    return parser.parse_args(words)


if __name__ == "__main__":
    arguments = parse()
    with faccel.init() as context:
        loss, _ = train(context, arguments)
        faccel.print(f"loss {loss:.4f}", ctx=context)
