"""The GPT of `gpt.py`, whose dimensions fit Megatron-LM's layers; not a script."""

import math

import torch
import torch.nn.functional as F
from torch import nn

VOCABULARY, LENGTH, WIDTH, HEADS = 256, 64, 64, 4


def rotate(x, positions):
    """Apply rotary positions to `x: T[batch, heads, length, width]` (Su et al. 2021)."""
    half = x.shape[-1] // 2
    frequencies = 10000.0 ** (-torch.arange(half, device=x.device, dtype=x.dtype) / half)
    angles = positions[:, None] * frequencies
    first, second = x.chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)


class Attention(nn.Module):
    def __init__(self, rotary):
        super().__init__()
        self.num_heads, self.rotary = HEADS, rotary
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        # Queries, keys and values of one head are neighbors: each rank has some of the heads.
        heads = self.qkv(x).unflatten(-1, (-1, 3, WIDTH // HEADS))
        q, k, v = (part.transpose(1, 2) for part in heads.unbind(-2))
        if self.rotary:
            positions = torch.arange(q.shape[2], device=q.device, dtype=q.dtype)
            q, k = rotate(q, positions), rotate(k, positions)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(x.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, rotary):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = Attention(rotary)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Embed(nn.Module):
    def __init__(self, rotary):
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, WIDTH)
        self.position = None if rotary else nn.Embedding(LENGTH, WIDTH)

    def forward(self, tokens):
        x = self.token(tokens)
        if self.position is None:
            return x
        return x + self.position(torch.arange(tokens.shape[1], device=tokens.device)[None])


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.logits = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, x):
        return self.logits(self.norm(x))


class GPT(nn.Module):
    def __init__(self, *, rotary, tied, depth):
        super().__init__()
        self.embed = Embed(rotary)
        self.blocks = nn.ModuleList(Block(rotary) for _ in range(depth))
        self.head = Head()
        # Megatron-LM's initialization: outputs of residual branches are divided by sqrt(2 * depth).
        for name, param in self.named_parameters():
            if param.ndim == 2:
                is_output = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(param, std=0.02 / math.sqrt(2 * depth if is_output else 1))
            elif name.endswith("bias"):
                nn.init.zeros_(param)
        if tied:
            self.head.logits.weight = self.embed.token.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def tensor_styles(positions, *, sequence_parallel):
    """Return how tensor parallel splits each module."""
    prefix = "sequence_" if sequence_parallel else ""
    styles = {
        "embed.token": "sequence_embedding" if sequence_parallel else "rowwise_embedding",
        "blocks.*.attention.qkv": prefix + "colwise",
        "blocks.*.attention.out": prefix + "rowwise",
        "blocks.*.up": prefix + "colwise",
        "blocks.*.down": prefix + "rowwise",
        "head.logits": prefix + "colwise_loss",  # no rank has the logits of all tokens
    }
    if sequence_parallel:  # norms and residuals have `length / tp` tokens on each rank
        styles |= dict.fromkeys(("blocks.*.norm1", "blocks.*.norm2", "head.norm"), "sequence")
        if positions == "learned":
            styles["embed.position"] = "sequence_embedding"
    return styles
