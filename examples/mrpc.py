"""Are two sentences paraphrases? Accelerate's `nlp_example` (GLUE MRPC) with faccel.

python examples/mrpc.py                          # a small BERT and generated pairs, offline
faccel launch --cpu --nproc 2 examples/mrpc.py   # 2 ranks, also with --mesh dp_shard=2
python examples/mrpc.py --model bert-base-cased --data nyu-mll/glue:mrpc --lr 2e-5 --epochs 3
"""

import argparse
import pathlib

import torch
import transformers as hf
from arguments import count, positive
from datasets import load_dataset
from paraphrases import write_pairs_and_model
from torch.utils.data import DataLoader

import faccel

WARMUP_STEPS = 100

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="name or folder for `from_pretrained`; default: a small BERT")
parser.add_argument("--data", help="`name` or `name:configuration`, or the stem of two CSV files")
parser.add_argument("--out", default="runs/mrpc", help="folder of the trained model")
parser.add_argument("--epochs", type=count, default=6)
parser.add_argument("--lr", type=positive, default=2e-3)
parser.add_argument("--batch-size", type=count, default=32, help="pairs per update over all ranks")
args = parser.parse_args()


def load_pairs(name):
    """Load a dataset by its name, or the files `{name}-train.csv` and `{name}-validation.csv`."""
    if not pathlib.Path(f"{name}-train.csv").exists():
        return load_dataset(*str(name).split(":"))
    files = {split: f"{name}-{split}.csv" for split in ("train", "validation")}
    return load_dataset("csv", data_files=files)


def tokenize(rows):
    return tokenizer(rows["sentence1"], rows["sentence2"], truncation=True)


ctx = faccel.init()
faccel.seed_everything(0, ctx)

# Rank 0 writes and downloads first; the other ranks find the files in the cache.
offline = pathlib.Path(args.out, "offline")
with faccel.main_first(ctx):
    if ctx.is_main and not (args.model and args.data):
        write_pairs_and_model(offline)
    tokenizer = hf.AutoTokenizer.from_pretrained(args.model or offline)
    net = hf.AutoModelForSequenceClassification.from_pretrained(args.model or offline, num_labels=2)
    data = load_pairs(args.data or offline / "pairs").map(tokenize, batched=True)
columns = ["label", *tokenizer.model_input_names]
data = data.select_columns(columns).rename_column("label", "labels")

options = {"batch_size": args.batch_size, "collate_fn": hf.DataCollatorWithPadding(tokenizer)}
train = faccel.shard(DataLoader(data["train"], shuffle=True, **options), ctx, split_batches=True)
test = faccel.shard(DataLoader(data["validation"], **options), ctx, split_batches=True)
model = faccel.wrap(net, ctx)
opt = faccel.wrap_optimizer(torch.optim.AdamW(model.parameters(), lr=args.lr), model, ctx)
num_updates = len(train.at(0)) * args.epochs
schedule = hf.get_linear_schedule_with_warmup(opt, WARMUP_STEPS, num_updates)
scaler = faccel.init_scaler(ctx)

for epoch in range(args.epochs):
    model.train()
    for batch in train.at(epoch):
        loss = model(**batch).loss
        scaler = faccel.scaled_backward(loss, scaler, ctx)
        info, scaler = faccel.optimizer_step(opt, scaler, ctx, clip_norm=1.0, scheduler=schedule)

    # `gather` drops padded rows, so each pair counts once.
    model.eval()
    correct = []
    with torch.no_grad():
        for batch in faccel.batches(test):
            is_correct = model(**batch.data).logits.argmax(-1) == batch.data["labels"]
            correct.append(faccel.gather(is_correct, ctx, num_valid=batch.num_valid))
    accuracy = torch.cat(correct).float().mean().item()
    faccel.print(f"epoch {epoch}: loss {loss.item():.4f}, accuracy {accuracy:.4f}", ctx=ctx)

faccel.checkpoint.export_model(model, args.out, ctx)  # `from_pretrained` loads it
if ctx.is_main:
    tokenizer.save_pretrained(args.out)
faccel.print(f"accuracy {accuracy:.4f}", ctx=ctx)
