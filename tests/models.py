"""A small language model for tests of parallelism: tied weights, a position table, norms, heads."""

import torch
import torch.nn.functional as F
from torch import nn

VOCABULARY, WIDTH, HEADS, LENGTH = 32, 16, 4, 8


class Attention(nn.Module):
    def __init__(self, width=WIDTH, heads=HEADS):
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        q, k, v = (
            layer(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        return self.o(
            F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        )


class Block(nn.Module):
    def __init__(self, width=WIDTH):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Embed(nn.Module):
    def __init__(self, vocabulary=VOCABULARY, width=WIDTH, length=LENGTH):
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.randn(length, width) / 4)

    def reset_parameters(self):
        nn.init.normal_(self.position, std=0.25)

    def forward(self, tokens, positions=None):
        return self.token(tokens) + (
            self.position[: tokens.shape[1]] if positions is None else self.position[positions]
        )


class CharModel(nn.Module):
    def __init__(self, depth=2, tied=True):
        super().__init__()
        self.embed = Embed()
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embed.token.weight

    def forward(self, tokens, positions=None):
        x = self.embed(tokens, positions)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


TENSOR = {
    "blocks.*.attention.q": "colwise", "blocks.*.attention.k": "colwise",
    "blocks.*.attention.v": "colwise",
    "blocks.*.attention.o": "rowwise", "blocks.*.up": "colwise", "blocks.*.down": "rowwise",
}  # fmt: skip


def model(dtype=torch.float64, **options):
    torch.manual_seed(3)
    return CharModel(**options).to(dtype)


def tokens(rows=8, seed=0, length=LENGTH):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (rows, length + 1), generator=generator)


def loss_of(logits, targets):
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
