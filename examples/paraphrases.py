"""Generates pairs of sentences and a small BERT, for `mrpc.py` without a network; not a script."""

import csv
import random

import transformers as hf
from tokenizers import BertWordPieceTokenizer

# For each slot of a sentence four values, and for each value two synonyms.
WORDS = {
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
NUM_VALUES = 4
NUM_PAIRS = {"train": 3000, "validation": 1000}
VOCAB_SIZE = 300
BERT = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
    # About 1 / sqrt(hidden_size). BERT's 0.02 is for a width of 768: at 64 the attention starts
    # almost uniform, and some orders of the data never leave the loss of a guess.
    "initializer_range": 0.1,
    "hidden_dropout_prob": 0.0,  # too small a model to overfit
    "attention_probs_dropout_prob": 0.0,
}


def choose_words(values, draw):
    """Return one synonym for the value of each slot."""
    return {slot: draw.choice(WORDS[slot][value]) for slot, value in values.items()}


def write_pairs(path, num_pairs, seed):
    """Write pairs with labels: 1 for synonyms, 0 for a difference in three or four slots."""
    draw = random.Random(seed)
    with open(path, "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["sentence1", "sentence2", "label"])
        for _ in range(num_pairs):
            label = draw.randrange(2)
            values = {slot: draw.randrange(NUM_VALUES) for slot in WORDS}
            other_values = dict(values)
            if label == 0:
                for slot in draw.sample(list(WORDS), draw.choice((3, 4))):
                    step = draw.randrange(1, NUM_VALUES)
                    other_values[slot] = (values[slot] + step) % NUM_VALUES
            first = "{who} {did} {what} {when}".format(**choose_words(values, draw))
            second = "{when} {who} {did} {what}".format(**choose_words(other_values, draw))
            rows.writerow([first, second, label])


def write_pairs_and_model(folder):
    """Write the pairs, a tokenizer that is trained on them, and a small BERT."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, num_pairs in NUM_PAIRS.items():
        write_pairs(folder / f"pairs-{split}.csv", num_pairs, seed=num_pairs)

    text = folder / "pairs-train.csv"
    wordpiece = BertWordPieceTokenizer()
    wordpiece.train([str(text)], vocab_size=VOCAB_SIZE, show_progress=False)
    tokens = {"[PAD]", "[UNK]", "[MASK]"}
    for line in text.read_text().splitlines():
        tokens.update(wordpiece.encode(line).tokens)
    vocab = {token: index for index, token in enumerate(sorted(tokens))}  # equal in each run
    tokenizer = hf.BertTokenizer(vocab=vocab)
    tokenizer.save_pretrained(folder)

    config = hf.BertConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **BERT)
    hf.BertForSequenceClassification(config).save_pretrained(folder)
