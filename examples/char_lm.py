"""Train a small GPT of transformers on Python's documentation, under any strategy.

    faccel launch --cpu --nproc 2 examples/char_lm.py --steps 50
    faccel launch --cpu --nproc 2 --mesh dp_shard=2 examples/char_lm.py --steps 50
    faccel launch --cpu --nproc 2 --strategy deepspeed --zero 2 examples/char_lm.py --steps 50
    faccel launch --cpu --mixed-precision fp8 examples/char_lm.py --model gpt_neox --emulate

Needs `pip install transformers`. `--runs DIR` saves checkpoints there and resumes from the newest.
`--export DIR` writes a model that `GPT2LMHeadModel.from_pretrained` loads. fp8 needs
`pip install "faccel[ao]"` and `--model gpt_neox`: the layers of GPT-2 are no `nn.Linear`.
"""

import argparse
from pydoc_data.topics import topics  # English text that is part of every Python

import torch
from arguments import count
from torch.utils.data import DataLoader, Dataset
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM

import faccel

LENGTH = 64  # characters of a sequence
GLOBAL_BATCH = 16  # sequences per update over all ranks
LEARNING_RATE = 1e-3
SAVE_EVERY = 10  # updates


class Text(Dataset):
    """Sequences of `int64[LENGTH]` bytes."""

    def __init__(self):
        text = "".join(topics[name] for name in sorted(topics)).encode()
        self.bytes = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()

    def __len__(self):
        return len(self.bytes) // LENGTH

    def __getitem__(self, index):
        return self.bytes[index * LENGTH :][:LENGTH]


def loss_fn(model, batch):
    return model(input_ids=batch.data, labels=batch.data).loss


parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("--steps", type=count, default=200)
parser.add_argument("--runs", help="directory of checkpoints")
parser.add_argument("--export", help="directory of the trained model")
parser.add_argument("--model", choices=("gpt2", "gpt_neox"), default="gpt2")
parser.add_argument("--emulate", action="store_true", help="compute fp8 on any device, slowly")
args = parser.parse_args()

ctx = faccel.init()
loader = DataLoader(Text(), GLOBAL_BATCH, shuffle=True)
train = faccel.shard(loader, ctx, split_batches=True)  # the batch size is the global one
faccel.seed_everything(0, ctx)
if args.model == "gpt2":
    config = GPT2Config(
        vocab_size=256,
        n_positions=LENGTH,
        n_embd=64,
        n_layer=3,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
    )
    net = GPT2LMHeadModel(config)
else:
    config = GPTNeoXConfig(
        vocab_size=256,
        max_position_embeddings=LENGTH,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
    )
    net = GPTNeoXForCausalLM(config)
plan = None
if ctx.config.mixed_precision == "fp8":
    plan = faccel.Plan(fp8=faccel.parallel.Fp8(emulate=args.emulate))
model = faccel.wrap(net, ctx, plan=plan)
opt = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
opt = faccel.wrap_optimizer(opt, model, ctx)
scaler = faccel.init_scaler(ctx)

# Resume from the newest checkpoint, bit for bit.
state = {"model": model, "opt": opt, "scaler": scaler, "cursor": train.at(0).cursor, "step": 0}
if args.runs and faccel.latest(args.runs, ctx):
    state = faccel.load(state, args.runs, ctx)
    faccel.print(f"resumed after step {state['step']}", ctx=ctx)
scaler, step = state["scaler"], state["step"]
loss = torch.zeros(())

for _, epoch_loader in train.epochs(10**6, start=state["cursor"]):
    for window in faccel.windows(epoch_loader, ctx):
        if step == args.steps:
            break
        losses, scaler = faccel.forward_backward(loss_fn, model, window, scaler, ctx)
        info, scaler = faccel.optimizer_step(opt, scaler, ctx, clip_norm=1.0)
        loss = losses.mean()
        step += 1
        if args.runs and step % SAVE_EVERY == 0:
            state |= {"scaler": scaler, "cursor": window.cursor, "step": step}
            faccel.save(state, args.runs, ctx, step=step, keep=2)
    if step == args.steps:
        break

if args.export:
    faccel.checkpoint.export_model(model, args.export, ctx)  # with config.json
loss = faccel.reduce(loss, ctx, op="mean")  # collective: on every rank
faccel.print(f"loss {loss:.4f}", ctx=ctx)
