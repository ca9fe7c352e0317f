"""A GPT with GPT-2's shapes, which returns its loss; 124 million parameters at the full size."""

import dataclasses

import torch
import torch.nn.functional as F
from torch import nn


@dataclasses.dataclass(frozen=True)
class Size:
    """How large the work of a measurement is.

    Args:
        vocabulary: Number of tokens; a multiple of 64, which GPUs multiply faster.
        width: Of the residual stream.
        depth: Number of blocks.
        num_heads: Of attention.
        length: Tokens of a sequence.
        batch_size: Sequences of a step.
        steps: Of a round.
        rounds: In which the contenders alternate.
        num_items: Of the dataset from which data is loaded.
        item_shape: Of one item.
        num_workers: Of the loader.
        saved_width: Width of the model that is saved.
    """

    vocabulary: int = 50304
    width: int = 768
    depth: int = 12
    num_heads: int = 12
    length: int = 1024
    batch_size: int = 8
    steps: int = 5
    rounds: int = 9
    num_items: int = 8192
    item_shape: tuple[int, ...] = (3, 64, 64)
    num_workers: int = 4
    saved_width: int = 768


SIZES = {
    "gpu": Size(),
    "cpu": Size(512, 64, 2, 4, 64, 4, 3, 7, 1024, (3, 32, 32), 2, 512),
    "quick": Size(128, 32, 2, 2, 16, 2, 1, 2, 64, (3, 8, 8), 1, 32),
}


class Block(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.num_heads = size.num_heads
        self.norm1, self.norm2 = nn.LayerNorm(size.width), nn.LayerNorm(size.width)
        self.qkv = nn.Linear(size.width, 3 * size.width)
        self.out = nn.Linear(size.width, size.width)
        self.up = nn.Linear(size.width, 4 * size.width)
        self.down = nn.Linear(4 * size.width, size.width)

    def forward(self, x):
        heads = self.qkv(self.norm1(x)).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # each [batch, heads, length, width of a head]
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class GPT(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.token = nn.Embedding(size.vocabulary, size.width)
        self.position = nn.Embedding(size.length, size.width)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.depth))
        self.norm = nn.LayerNorm(size.width)
        self.head = nn.Linear(size.width, size.vocabulary, bias=False)
        self.head.weight = self.token.weight
        for param in self.parameters():
            if param.ndim > 1:
                nn.init.normal_(param, std=0.02)

    def forward(self, tokens):
        """Return the mean loss of the next token of `int64[batch, length + 1]`."""
        x, targets = tokens[:, :-1], tokens[:, 1:]
        hidden = self.token(x) + self.position.weight
        for block in self.blocks:
            hidden = block(hidden)
        # In the model, so that no contender has to convert the logits, its largest tensor.
        return F.cross_entropy(self.head(self.norm(hidden)).flatten(0, 1), targets.flatten())


def gpt(size, device="cpu"):
    """Return a model that is the same in every call."""
    torch.manual_seed(0)
    return GPT(size).to(device)


def token_batches(size, count, device="cpu", seed=0):
    """Return batches of random tokens, on the device."""
    generator = torch.Generator().manual_seed(seed)
    shape = (count, size.batch_size, size.length + 1)
    return torch.randint(size.vocabulary, shape, generator=generator).to(device).unbind()
