"""The character model and the text of the examples of parallelism; not a script."""

from pydoc_data.topics import topics  # English text that is part of every Python

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

LENGTH = 64  # characters of a sequence
WIDTH = 64  # features of a token
HEADS = 4
DEPTH = 4  # blocks


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_heads = HEADS
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x):
        q, k, v = self.heads(self.q(x)), self.heads(self.k(x)), self.heads(self.v(x))
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(x.transpose(1, 2).flatten(2))

    def heads(self, x):
        # The number of heads is -1: under tensor parallel each rank has some of them.
        return x.unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = Attention()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Embed(nn.Module):
    def __init__(self):
        super().__init__()
        self.token, self.position = nn.Embedding(256, WIDTH), nn.Embedding(LENGTH, WIDTH)

    def forward(self, tokens):
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        return self.token(tokens) + self.position(positions)


class CharModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = Embed()
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 256, bias=False)

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Text(Dataset):
    """Sequences of `int64[LENGTH + 1]` bytes: inputs, and the same shifted by one as labels."""

    def __init__(self):
        text = "".join(topics[name] for name in sorted(topics)).encode()
        self.bytes = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()

    def __len__(self):
        return (len(self.bytes) - 1) // LENGTH

    def __getitem__(self, index):
        return self.bytes[index * LENGTH :][: LENGTH + 1]


def loss_fn(model, tokens):
    """Return the mean cross-entropy of each next character."""
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
