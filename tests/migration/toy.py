"""Models and data of the scripts: generated or from scikit-learn, built in milliseconds."""

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset

VOCABULARY = 40


class Permuted(Sampler):
    """A new order in each epoch. The libraries keep it, but shuffle differently themselves."""

    def __init__(self, dataset, seed=0):
        self.size, self.seed, self.epoch = len(dataset), seed, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return self.size

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed + 1000 * self.epoch)
        return iter(torch.randperm(self.size, generator=generator).tolist())


class Rows(Dataset):
    """Rows of a dict of tensors."""

    def __init__(self, **columns):
        self.columns = columns

    def __len__(self):
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index):
        return {name: column[index] for name, column in self.columns.items()}


def sentences(num_rows, seed, length=12):
    """Sentences of two kinds: whether the sum of the tokens is even."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(2, VOCABULARY, (num_rows, length), generator=generator)
    labels = (tokens[:, 0] > VOCABULARY // 2).long()
    return Rows(input_ids=tokens, attention_mask=torch.ones_like(tokens), labels=labels)


def text_loaders(batch_size, seed=0, num_rows=44):
    train, test = sentences(num_rows, seed), sentences(22, seed + 1)
    # A generator, because a loader without one draws from that of torch.
    return (
        DataLoader(train, batch_size, sampler=Permuted(train), generator=torch.Generator()),
        DataLoader(test, 8, generator=torch.Generator()),
    )


def classifier():
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.0,
    )
    return BertForSequenceClassification(config)


def language_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    return LlamaForCausalLM(config)


def digits(num_rows):
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images[:num_rows] / 16.0, dtype=torch.float32).unsqueeze(1)
    return TensorDataset(images, torch.tensor(data.target[:num_rows]))


def convnet():
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(144, 10),
    )


class UNet(torch.nn.Module):
    """Predicts noise from a noisy image and a time step."""

    def __init__(self):
        super().__init__()
        self.down = torch.nn.Conv2d(1, 6, 3, padding=1)
        self.time = torch.nn.Embedding(20, 6)
        self.middle = torch.nn.Conv2d(6, 6, 3, padding=1)
        self.up = torch.nn.Conv2d(12, 1, 3, padding=1)

    def forward(self, image, step):
        down = torch.relu(self.down(image)) + self.time(step)[:, :, None, None]
        return self.up(torch.cat([down, torch.relu(self.middle(down))], 1))
