"""Do two sentences say the same? The `nlp_example` of Accelerate (GLUE MRPC): transformers, datasets and faccel.

python examples/mrpc.py                                   # a small BERT and pairs, both made here: no network
faccel launch --cpu --nproc 2 examples/mrpc.py            # on 2 ranks, or with --mesh dp_shard=2: as accurate
python examples/mrpc.py --model bert-base-cased --data nyu-mll/glue:mrpc --lr 2e-5 --epochs 3
"""

import argparse
import csv
import pathlib
import random

import torch
import transformers as hf
from datasets import load_dataset
from tokenizers import BertWordPieceTokenizer
from torch.utils.data import DataLoader

import faccel

parser = argparse.ArgumentParser()
parser.add_argument(
    "--model", help="a name or a folder for `from_pretrained`; without it a small BERT is made"
)
parser.add_argument(
    "--data", help="`name` or `name:configuration` of a data set, or the stem of two CSV files"
)
parser.add_argument("--out", default="runs/mrpc", help="where the trained model goes")
parser.add_argument("--epochs", type=int, default=6)
parser.add_argument("--lr", type=float, default=2e-3)
parser.add_argument("--batch-size", type=int, default=32, help="of all ranks together")
args = parser.parse_args()

WORDS = {  # of each thing two names: what makes a paraphrase
    "who": [
        ("the firm", "the company"),
        ("a court", "a judge"),
        ("police", "officers"),
        ("the team", "the players"),
    ],
    "did": [
        ("bought", "acquired"),
        ("rejected", "turned down"),
        ("praised", "applauded"),
        ("found", "discovered"),
    ],
    "what": [
        ("a plan", "a scheme"),
        ("the film", "the movie"),
        ("a car", "a vehicle"),
        ("the shares", "the stock"),
    ],
    "when": [
        ("today", "this day"),
        ("on sunday", "at the weekend"),
        ("last year", "a year ago"),
        ("in may", "in june"),
    ],
}


def write_pairs(path, num_pairs, seed):
    """Write pairs of sentences: half of them say the same in other words, half differ in three things or all four."""
    draw = random.Random(seed)
    with open(path, "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["sentence1", "sentence2", "label"])
        for _ in range(num_pairs):
            label = draw.randrange(2)
            first = {part: draw.randrange(4) for part in WORDS}
            changed = [] if label else draw.sample(list(WORDS), draw.choice((3, 4)))
            second = first | {part: (first[part] + draw.randrange(1, 4)) % 4 for part in changed}
            one, two = (
                {p: draw.choice(WORDS[p][n]) for p, n in each.items()} for each in (first, second)
            )
            rows.writerow(
                [
                    "{who} {did} {what} {when}".format(**one),
                    "{when} {who} {did} {what}".format(**two),
                    label,
                ]
            )


def make_offline(folder):
    """Write pairs, a tokenizer that is trained on them and a small BERT, as others find them on the hub."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, num_pairs in (("train", 3000), ("validation", 1000)):
        write_pairs(folder / f"pairs-{split}.csv", num_pairs, seed=num_pairs)
    wordpiece = BertWordPieceTokenizer()
    wordpiece.train([str(folder / "pairs-train.csv")], vocab_size=300, show_progress=False)
    lines = (folder / "pairs-train.csv").read_text().splitlines()
    used = {token for line in lines for token in wordpiece.encode(line).tokens} | {
        "[PAD]",
        "[UNK]",
        "[MASK]",
    }
    tokenizer = hf.BertTokenizer(
        vocab={token: n for n, token in enumerate(sorted(used))}
    )  # the same in each run
    tokenizer.save_pretrained(folder)
    size = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
    }
    drop = {
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }  # too small to need any
    ids = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "max_position_embeddings": 64,
    }
    config = hf.BertConfig(**ids, **size, **drop)
    hf.BertForSequenceClassification(config).save_pretrained(folder)


ctx = faccel.init()
faccel.seed_everything(0, ctx)
offline = pathlib.Path(args.out, "offline")
with faccel.main_first(ctx):  # rank 0 writes and downloads; the others find what it made
    if ctx.is_main and not (args.model and args.data):
        make_offline(offline)
    tokenizer = hf.AutoTokenizer.from_pretrained(args.model or offline)
    net = hf.AutoModelForSequenceClassification.from_pretrained(args.model or offline, num_labels=2)
    if args.data and not pathlib.Path(f"{args.data}-train.csv").exists():
        data = load_dataset(*args.data.split(":"))
    else:
        stem = args.data or offline / "pairs"
        data = load_dataset(
            "csv", data_files={s: f"{stem}-{s}.csv" for s in ("train", "validation")}
        )
    data = data.map(
        lambda rows: tokenizer(rows["sentence1"], rows["sentence2"], truncation=True), batched=True
    )
data = data.select_columns(["label", *tokenizer.model_input_names]).rename_column("label", "labels")

options = {"batch_size": args.batch_size, "collate_fn": hf.DataCollatorWithPadding(tokenizer)}
train = faccel.shard(DataLoader(data["train"], shuffle=True, **options), ctx, split_batches=True)
test = faccel.shard(DataLoader(data["validation"], **options), ctx, split_batches=True)
model = faccel.wrap(net, ctx)
opt = faccel.wrap_optimizer(torch.optim.AdamW(model.parameters(), lr=args.lr), model, ctx)
schedule = hf.get_linear_schedule_with_warmup(opt, 100, len(train.at(0)) * args.epochs)
scaler = faccel.init_scaler(ctx)

for epoch in range(args.epochs):
    model.train()
    for batch in train.at(epoch):
        loss = model(**batch).loss
        scaler = faccel.scaled_backward(loss, scaler, ctx)
        info, scaler = faccel.optimizer_step(opt, scaler, ctx, clip_norm=1.0, scheduler=schedule)
    model.eval()
    hits = []
    with torch.no_grad():
        for batch in faccel.batches(test):
            right = model(**batch.data).logits.argmax(-1) == batch.data["labels"]
            hits.append(faccel.gather(right, ctx, num_valid=batch.num_valid))  # each row once
    accuracy = torch.cat(hits).float().mean().item()
    faccel.print(f"epoch {epoch}: loss {loss.item():.4f}, accuracy {accuracy:.4f}", ctx=ctx)

faccel.checkpoint.export_model(model, args.out, ctx)  # `from_pretrained` reads it
if ctx.is_main:
    tokenizer.save_pretrained(args.out)
faccel.print(f"accuracy {accuracy:.4f}", ctx=ctx)
