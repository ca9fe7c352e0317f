"""Writes the files of this folder with Megatron-core 0.16.1, in an environment that has it.

    python tests/golden/megatron/write.py

`corpus.bin` and `corpus.idx` are of `IndexedDatasetBuilder`. `samples.json` has what `GPTDataset`
reads from them: its number of samples in an epoch, and its samples in the order of the documents.
"""

import json
import pathlib
import tempfile

import numpy as np

FOLDER = pathlib.Path(__file__).parent
LENGTHS = (2, 5, 8, 32, 64)  # tokens of a sample
SPLITS = ((0.0, 0.6), (0.6, 0.9), (0.9, 1.0))  # of `--split 60,30,10`


class Tokenizer:
    """What `GPTDatasetConfig` reads of a tokenizer."""

    vocab_size, eod, pad = 1000, 999, -1
    unique_identifiers = None


def write(prefix):
    """Write 12 documents of one or two sequences."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    generator = np.random.RandomState(3)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    first = 0
    for _ in range(12):
        lengths = generator.randint(1, 20, generator.randint(1, 3)).tolist()
        builder.add_document(np.arange(first, first + sum(lengths)), lengths)
        first += sum(lengths)
    builder.finalize(f"{prefix}.idx")


def dataset_of(prefix, length, split, cache):
    """Return Megatron-core's dataset of a part of the sequences."""
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=length,
        blend=([str(prefix)], None),
        split="1",
        path_to_cache=cache,
        tokenizer=Tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
    )
    indexed = IndexedDataset(str(prefix))
    begin, end = (round(fraction * float(len(indexed))) for fraction in split)
    indices = np.arange(begin, end, dtype=np.int32)
    return GPTDataset(indexed, str(prefix), indices, None, Split.train, config)


def in_order(dataset, length):
    """Return the samples of the dataset without its shuffles."""
    from megatron.core.datasets import helpers

    documents, lengths = dataset.indices, dataset.dataset.sequence_lengths
    num_tokens = int(lengths[documents].sum())
    dataset.document_index = documents
    dataset.sample_index = helpers.build_sample_idx(
        lengths.copy(), documents, length, 1, num_tokens, True, 1
    )
    dataset.shuffle_index = np.arange(len(dataset.sample_index) - 1)
    samples = [dataset[index] for index in range(len(dataset))]
    return [[*sample["tokens"].tolist(), sample["labels"][-1].item()] for sample in samples]


def main():
    """Write all files."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    prefix = FOLDER / "corpus"
    write(prefix)
    indexed = IndexedDataset(str(prefix))
    rows = []
    for split in ((0.0, 1.0), *SPLITS):
        for length in LENGTHS:
            # A cache for each: its key lacks the part of the sequences.
            with tempfile.TemporaryDirectory() as cache:
                dataset = dataset_of(prefix, length, split, cache)
            row = {"length": length, "split": split, "num_samples": len(dataset)}
            rows.append(row | {"samples": in_order(dataset, length)})
    content = {"sequences": [sequence.tolist() for sequence in indexed], "datasets": rows}
    content |= {"documents": indexed.document_indices.tolist()}
    (FOLDER / "samples.json").write_text(json.dumps(content) + "\n")


# Only as a script: pytest imports every module to look for examples, and has no Megatron-core.
if __name__ == "__main__":
    main()
