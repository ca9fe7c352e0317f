"""A mixture of experts: a layer of many small networks, of which each token runs through a few."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from faccel.context import DistContext
from faccel.effects import effectful, updates
from faccel.errors import ConfigError
from faccel.protocols import Collectives
from faccel.tree import local_tensor


class Experts(nn.Module):
    """Networks of two layers without biases, stacked; expert `e` is `down[e] @ gelu(up[e] @ token)`.

    Args:
        width: Features of a token.
        hidden: Features between the two layers.
        num_experts: How many networks.
    """

    def __init__(self, width: int, hidden: int, num_experts: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.empty(num_experts, hidden, width))
        self.down = nn.Parameter(torch.empty(num_experts, width, hidden))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Begin as `nn.Linear` does."""
        with torch.no_grad():
            for weight in (self.up, self.down):
                bound = 1 / math.sqrt(weight.shape[-1])
                weight.uniform_(-bound, bound)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Return `T[experts, n, width]` from each expert's own `T[experts, n, width]`, for the experts held here."""
        return F.gelu(rows @ local_tensor(self.up).mT) @ local_tensor(self.down).mT


class _Exchange(torch.autograd.Function):
    """All-to-all over the axis `ep`; backward sends the gradients back, times `scale`."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, comm: Collectives, scale: float) -> torch.Tensor:
        ctx.comm, ctx.scale = comm, scale
        return comm.all_to_all(x.contiguous(), "ep")

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:
        return _Exchange.apply(grad_outputs[0], ctx.comm, 1.0) * ctx.scale, None, None


class MoE(nn.Module):
    """A router and the experts that it sends each token to, the `top_k` of largest probability.

    Their outputs are summed, weighted by the probabilities of these `top_k` over their sum. On a mesh with `ep`,
    `faccel.wrap` gives each rank of that axis its part of the experts, and tokens travel to them and back: two
    all-to-alls in forward and two in backward. On any other mesh all experts compute here.

    With a `capacity_factor`, an expert takes at most `ceil(capacity_factor * tokens * top_k / num_experts)` of the
    `tokens` of each rank: first come those for which it is the first choice, in their order, then those for which it is
    the second, and so on. Of the others its part of the sum is left out. Ranks must have the same number of tokens.
    Without one nothing is dropped, every expert gets as much room as the most wanted one of all ranks needs, and the
    host waits for that number.

    After a forward, `balance_loss` is its auxiliary loss, 0-d in at least fp32: how unevenly tokens are spread, 1 where
    all experts get the same share (Fedus, Zoph and Shazeer, "Switch Transformers", 2021, eq. 4 without alpha, with the
    share of the `top_k` choices as f). Add it to the loss, times about 0.01. On a mesh with `ep` the shares are those
    of all ranks, so that the mean over ranks is what one process computes.

    Args:
        width: Features of a token, in and out.
        hidden: Features between the two layers of an expert.
        num_experts: How many; the extent of `ep` divides it.
        top_k: Experts per token.
        capacity_factor: How much more than an even share an expert takes; None takes all.

    Raises:
        ConfigError: `top_k` or `capacity_factor` cannot be.

    Examples:
        >>> moe = MoE(8, 16, num_experts=4, top_k=2)
        >>> moe(torch.zeros(3, 5, 8)).shape, sorted(moe.state_dict())
        (torch.Size([3, 5, 8]), ['experts.down', 'experts.up', 'router.weight'])
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        num_experts: int,
        *,
        top_k: int = 2,
        capacity_factor: float | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= num_experts:
            got, fix = (
                f"top_k={top_k} of {num_experts}",
                "use `top_k=1` or more, and no more than there are experts",
            )
            raise ConfigError(
                "each token goes to at least one expert, and once to each", got=got, fix=fix
            )
        if capacity_factor is not None and not capacity_factor > 0:
            fix = "use `capacity_factor=1.25`, or None to drop nothing"
            raise ConfigError(
                "`capacity_factor` must be positive", got=str(capacity_factor), fix=fix
            )
        self.num_experts, self.top_k, self.capacity_factor = num_experts, top_k, capacity_factor
        self.router = nn.Linear(width, num_experts, bias=False)
        self.experts = Experts(width, hidden, num_experts)
        self.balance_loss = torch.zeros(())
        self._comm: Collectives | None = None

    @effectful(updates("self"))
    def connect(self, ctx: DistContext) -> None:
        """Let tokens travel over the axis `ep` of `ctx`, each of whose ranks holds its part of `experts` from now on.

        Effects: updates self. `faccel.wrap` calls it.
        """
        self._comm = ctx.comm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `T[..., width]` from `T[..., width]`. Sets `balance_loss`; collective on a mesh with `ep`."""
        tokens = x.reshape(-1, x.shape[-1])
        logits = self.router(tokens)
        chances = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        weights, chosen = chances.topk(self.top_k)
        weights = weights / weights.sum(-1, keepdim=True)

        expert = chosen.T.reshape(
            -1
        )  # [top_k * tokens]: the first choices of all tokens, then the second ones
        is_for = expert[:, None] == torch.arange(self.num_experts, device=x.device)
        counts = is_for.sum(0)
        self.balance_loss = self._balance(chances, counts)

        # Each choice has a slot among those of its expert; what is dropped goes to one more, behind all of them.
        capacity = self._capacity(counts, len(tokens))
        num_slots = self.num_experts * capacity
        place = is_for.cumsum(0).gather(1, expert[:, None])[:, 0] - 1
        slot = torch.where(place < capacity, expert * capacity + place, num_slots)
        rows = tokens.new_zeros(num_slots + 1, tokens.shape[1]).index_add(
            0, slot, tokens.repeat(self.top_k, 1)
        )
        out = self._compute(rows[:-1].unflatten(0, (self.num_experts, capacity))).flatten(0, 1)
        out = torch.cat([out, out.new_zeros(1, out.shape[1])])[slot]
        return (out * weights.T.reshape(-1, 1)).view(self.top_k, *x.shape).sum(0).to(x.dtype)

    def _balance(self, chances: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        if self._comm is not None:
            counts = self._comm.all_reduce(counts, "sum", "loss")
        shares = counts / counts.sum().clamp(min=1)
        return self.num_experts * (shares.to(chances.dtype) * chances.mean(0)).sum()

    def _capacity(self, counts: torch.Tensor, num_tokens: int) -> int:
        if self.capacity_factor is not None:
            return math.ceil(self.capacity_factor * num_tokens * self.top_k / self.num_experts)
        largest = counts.max()
        return int(largest if self._comm is None else self._comm.all_reduce(largest, "max", "ep"))

    def _compute(self, rows: torch.Tensor) -> torch.Tensor:
        """Return each expert's output for its rows, `T[num_experts, capacity, width]` both."""
        comm = self._comm
        if comm is None:
            return self.experts(rows)
        # An expert sees the tokens of all ranks of the axis, whose losses are averaged: its gradients, too, are to be
        # a mean over them. So those of its outputs are divided, and what goes back to the tokens is multiplied again.
        size = comm.size("ep")
        here = _Exchange.apply(
            rows.unflatten(0, (size, -1)), comm, float(size)
        )  # [ep, experts here, capacity, width]
        done = (
            self.experts(here.transpose(0, 1).flatten(1, 2))
            .unflatten(1, (size, -1))
            .transpose(0, 1)
        )
        return _Exchange.apply(done, comm, 1 / size).flatten(0, 1)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "balance_loss": self.balance_loss.detach()}  # a copy has no graph
