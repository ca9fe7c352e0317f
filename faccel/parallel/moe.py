"""A mixture of experts: a layer of many small networks, of which each token uses a few."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from faccel.checks import in_range, positive
from faccel.context import DistContext
from faccel.effects import effectful, updates
from faccel.protocols import Collectives
from faccel.tree import local_tensor


class Experts(nn.Module):
    """Stacked two-layer networks without biases; expert `e` is `down[e] @ gelu(up[e] @ token)`.

    Args:
        width: Features of a token.
        hidden: Features between the two layers.
        num_experts: Number of networks.
    """

    def __init__(self, width: int, hidden: int, num_experts: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.empty(num_experts, hidden, width))
        self.down = nn.Parameter(torch.empty(num_experts, width, hidden))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize as `nn.Linear` does."""
        with torch.no_grad():
            for weight in (self.up, self.down):
                bound = 1 / math.sqrt(weight.shape[-1])
                weight.uniform_(-bound, bound)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Return `T[experts, n, width]` from the rows of each expert, `T[experts, n, width]`.

        `experts` is the number of experts on this rank.
        """
        return F.gelu(rows @ local_tensor(self.up).mT) @ local_tensor(self.down).mT


class _Exchange(torch.autograd.Function):
    """All-to-all over the axis `ep`; backward sends the gradients back, times `scale`."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, comm: Collectives, scale: float) -> torch.Tensor:
        ctx.comm = comm
        ctx.scale = scale
        return comm.all_to_all(x.contiguous(), "ep")

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:
        # The inverse of an all-to-all is an all-to-all. `apply`, for second derivatives.
        grad = _Exchange.apply(grad_outputs[0], ctx.comm, 1.0)
        return grad * ctx.scale, None, None


class _Divide(torch.autograd.Function):
    """Takes this rank's part of dim 1 on `tp`, of a tensor that is equal on its ranks."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, comm: Collectives) -> torch.Tensor:
        ctx.comm = comm
        return x.chunk(comm.size("tp"), dim=1)[comm.rank("tp")]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:
        # Every rank needs all gradients: it continues with the full tensor, as the others do.
        return _Join.apply(grad_outputs[0], ctx.comm), None


class _Join(torch.autograd.Function):
    """Returns the parts of all ranks of `tp` along dim 1, on each of them."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, comm: Collectives) -> torch.Tensor:
        ctx.comm = comm
        parts = comm.all_gather(x.contiguous(), "tp")  # [tp, experts, part, width]
        return parts.transpose(0, 1).flatten(1, 2)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:
        # Not a sum over ranks: the ranks compute the same loss of the full tensor.
        return _Divide.apply(grad_outputs[0], ctx.comm), None


class MoE(nn.Module):
    """A router and experts; each token goes to the `top_k` experts of largest probability.

    The output is the sum of the experts' outputs, weighted by these probabilities, normalized to
    sum 1. On a mesh with `ep`, `faccel.wrap` shards the experts over that axis. Tokens are sent to
    their experts and back: two all-to-alls in forward and two in backward. On a mesh with `tp`,
    too, each rank of a `tp` group sends an equal part of the tokens, and an all-gather returns the
    outputs to all of them. On meshes without `ep` each rank computes all experts.

    With a `capacity_factor`, an expert processes at most `ceil(capacity_factor * tokens * top_k /
    num_experts)` of the tokens of each rank. First choices come first, then second choices, each
    in the order of the tokens. The other tokens are dropped: the expert adds 0 to their sum. Ranks
    must have equal numbers of tokens. Without it no token is dropped. Every expert then gets as
    many slots as the busiest expert of all ranks, and the host waits for that number.

    After a forward, `balance_loss` is the auxiliary loss, 0-d, in at least fp32. It measures how
    unevenly tokens are routed, and is 1 if all experts get equally many (Fedus, Zoph and Shazeer,
    "Switch Transformers", 2021, eq. 4 without alpha, with f from the `top_k` choices). Add it to
    the loss, times about 0.01. With `ep` it counts the tokens of all ranks, so that the mean over
    ranks is the loss of one process.

    Args:
        width: Features of a token, in and out.
        hidden: Features between the two layers of an expert.
        num_experts: Number of experts; a multiple of the size of `ep`.
        top_k: Experts per token, 1 to `num_experts`.
        capacity_factor: Slots of an expert, relative to an even share; None drops nothing.

    Raises:
        ConfigError: `top_k` or `capacity_factor` is out of range.

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
        in_range("top_k", top_k, 1, num_experts)
        if capacity_factor is not None:
            positive("capacity_factor", capacity_factor)
        self.num_experts = num_experts
        self.top_k = top_k
        self.capacity_factor = capacity_factor
        self.router = nn.Linear(width, num_experts, bias=False)
        self.experts = Experts(width, hidden, num_experts)
        self.balance_loss = torch.zeros(())
        self._comm: Collectives | None = None
        self._tp_size = 1

    @effectful(updates("self"))
    def connect(self, ctx: DistContext) -> None:
        """Exchange tokens over the axis `ep` of `ctx`; each of its ranks has a shard of `experts`.

        Effects: updates self. `faccel.wrap` calls it.
        """
        self._comm = ctx.comm
        self._tp_size = ctx.mesh.spec.tp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `T[..., width]` from `T[..., width]`.

        Sets `balance_loss`. Collective on a mesh with `ep`.
        """
        tokens = x.reshape(-1, x.shape[-1])
        logits = self.router(tokens)
        probs = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        weights, choices = probs.topk(self.top_k)
        weights = weights / weights.sum(-1, keepdim=True)

        # expert[top_k * tokens]: the first choices of all tokens, then their second choices, ...
        expert = choices.T.reshape(-1)
        is_expert = expert[:, None] == torch.arange(self.num_experts, device=x.device)
        counts = is_expert.sum(0)
        self.balance_loss = self._balance_loss(probs, counts)

        # The n-th choice of expert e has slot e * capacity + n. Dropped choices have the slot
        # after all others.
        capacity = self._capacity(counts, len(tokens))
        num_slots = self.num_experts * capacity
        position = is_expert.cumsum(0).gather(1, expert[:, None])[:, 0] - 1
        slot = torch.where(position < capacity, expert * capacity + position, num_slots)
        rows = tokens.new_zeros(num_slots + 1, tokens.shape[1])
        rows = rows.index_add(0, slot, tokens.repeat(self.top_k, 1))

        out = self._run_experts(rows[:-1].unflatten(0, (self.num_experts, capacity)))
        out = out.flatten(0, 1)
        out = torch.cat([out, out.new_zeros(1, out.shape[1])])[slot]
        out = out * weights.T.reshape(-1, 1)
        return out.view(self.top_k, *x.shape).sum(0).to(x.dtype)

    def _balance_loss(self, probs: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        # num_experts * sum_e f_e * P_e: f_e is the fraction of choices, P_e the mean probability.
        if self._comm is not None:
            counts = self._comm.all_reduce(counts, "sum", "loss")
        fractions = counts / counts.sum().clamp(min=1)
        return self.num_experts * (fractions.to(probs.dtype) * probs.mean(0)).sum()

    def _capacity(self, counts: torch.Tensor, num_tokens: int) -> int:
        if self.capacity_factor is not None:
            return math.ceil(self.capacity_factor * num_tokens * self.top_k / self.num_experts)
        largest = counts.max()
        if self._comm is not None:
            largest = self._comm.all_reduce(largest, "max", "ep")
        return int(largest)

    def _run_experts(self, rows: torch.Tensor) -> torch.Tensor:
        """Return each expert's output for its rows, `T[num_experts, capacity, width]` both."""
        comm = self._comm
        if comm is None:
            return self.experts(rows)
        if self._tp_size == 1:
            return self._exchange(rows, comm)
        # The ranks of `tp` have the same rows: each sends a part of the slots of every expert.
        # torchtitan divides the tokens instead, and gathers `top_k` times fewer rows; equal parts
        # of the slots need no second capacity, however the tokens are routed.
        capacity = rows.shape[1]
        padded_rows = F.pad(rows, (0, 0, 0, -capacity % self._tp_size))
        outputs = self._exchange(_Divide.apply(padded_rows, comm), comm)
        return _Join.apply(outputs, comm)[:, :capacity]

    def _exchange(self, rows: torch.Tensor, comm: Collectives) -> torch.Tensor:
        """Return each expert's output for the rows that this rank sends to it."""
        # An expert processes the rows of all ranks of the axis. Their losses are averaged, those
        # of ranks of `tp` are one. Its gradients must be a mean over the losses, too: gradients of
        # its outputs are divided by the number of losses, and those sent back multiplied by it.
        # FSDP averages over the other ranks: 1 / (ep_storage * ep / tp) = 1 / (dp_shard * cp).
        size = comm.size("ep")
        num_losses = size / self._tp_size
        by_rank = rows.unflatten(0, (size, -1))  # [ep, experts of the rank, capacity, width]
        received = _Exchange.apply(by_rank, comm, num_losses)
        local_rows = received.transpose(0, 1).flatten(1, 2)
        outputs = self.experts(local_rows).unflatten(1, (size, -1)).transpose(0, 1)
        return _Exchange.apply(outputs, comm, 1 / num_losses).flatten(0, 1)

    def __getstate__(self) -> dict[str, Any]:
        # A copy has no graph: `deepcopy` refuses tensors that are not leaves.
        return {**self.__dict__, "balance_loss": self.balance_loss.detach()}
