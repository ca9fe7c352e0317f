"""A small GPT of transformers learns to write like Python's own documentation, under any strategy.

    faccel launch --cpu --nproc 2 examples/char_lm.py --steps 50
    faccel launch --cpu --nproc 2 --mesh dp_shard=2 examples/char_lm.py --steps 50
    faccel launch --cpu --nproc 2 --strategy deepspeed --zero 2 examples/char_lm.py --steps 50

Needs `pip install transformers`. With `--runs DIR` it saves there, and goes on from what it finds; with `--export DIR`
it ends with a model that `GPT2LMHeadModel.from_pretrained` loads.
"""

import argparse
from pydoc_data.topics import topics  # real English in every Python

import torch
from torch.utils.data import DataLoader, Dataset
from transformers import GPT2Config, GPT2LMHeadModel

import faccel

LENGTH = 64  # characters that the model sees at once
BATCH = 16  # pieces of text in an update, on all ranks together
RATE = 1e-3
SAVE_EVERY = 10


class Text(Dataset):
    """Pieces of the text, `T[LENGTH]` bytes each."""

    def __init__(self):
        text = "".join(topics[name] for name in sorted(topics)).encode()
        self.bytes = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()

    def __len__(self):
        return len(self.bytes) // LENGTH

    def __getitem__(self, number):
        return self.bytes[number * LENGTH :][:LENGTH]


parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--runs", help="directory of checkpoints")
parser.add_argument("--export", help="directory of the model that comes out")
args = parser.parse_args()

ctx = faccel.init()
train = faccel.shard(
    DataLoader(Text(), BATCH, shuffle=True), ctx, split_batches=True
)  # BATCH is the whole world's
faccel.seed_everything(0, ctx)
config = GPT2Config(vocab_size=256, n_positions=LENGTH, n_embd=64, n_layer=3, n_head=4,
                    resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None)  # fmt: skip
model = faccel.wrap(GPT2LMHeadModel(config), ctx)
opt = faccel.wrap_optimizer(torch.optim.AdamW(model.parameters(), lr=RATE), model, ctx)
scaler = faccel.init_scaler(ctx)

# What a run goes on from, bit for bit
state = {"model": model, "opt": opt, "scaler": scaler, "cursor": train.at(0).cursor, "step": 0}
if args.runs and faccel.latest(args.runs, ctx):
    state = faccel.load(state, args.runs, ctx)
    faccel.print(f"goes on after step {state['step']}", ctx=ctx)
scaler, step = state["scaler"], state["step"]
loss = torch.zeros(())

for _, loader in train.epochs(10**6, start=state["cursor"]):
    for window in faccel.windows(loader, ctx):
        if step == args.steps:
            break
        losses, scaler = faccel.parallel.pipeline_step(
            lambda call, tokens: call(input_ids=tokens, labels=tokens).loss,
            model,
            window,
            scaler,
            ctx,
        )
        info, scaler = faccel.optimizer_step(opt, scaler, ctx, clip_norm=1.0)
        step, loss = step + 1, losses.mean()
        if args.runs and step % SAVE_EVERY == 0:
            state |= {"scaler": scaler, "cursor": window.cursor, "step": step}
            faccel.save(state, args.runs, ctx, step=step, keep=2)
    if step == args.steps:
        break

if args.export:
    faccel.checkpoint.export_model(model, args.export, ctx)  # with its config.json
loss = faccel.reduce(loss, ctx, op="mean")  # on every rank: it is collective
faccel.print(f"loss {loss:.4f}", ctx=ctx)
