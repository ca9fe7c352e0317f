"""Optimizer states spread over the data ranks (ZeRO-1): torch's ZeroRedundancyOptimizer."""

from __future__ import annotations

import warnings
from collections import defaultdict
from typing import Any

import attrs
import torch
from torch.optim import LBFGS, Optimizer

from faccel.comm.all_or_error import all_or_error
from faccel.context import DistContext
from faccel.errors import CheckpointError, OptimizerError
from faccel.protocols import DATA
from faccel.tree import Tree, map_leaves

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, of its functional optimizers
    from torch.distributed.optim import ZeroRedundancyOptimizer


def shard_optimizer(opt: Optimizer, ctx: DistContext) -> Optimizer:
    """Return an optimizer that steps as `opt` does, each data rank for its share of the parameters."""
    if isinstance(opt, LBFGS):
        raise OptimizerError(
            "this optimizer looks at all parameters at once, so its states cannot be spread over ranks",
            got="an LBFGS",
            fix="leave `shard_optimizer` out, or use one that treats each parameter on its own, as AdamW does",
        )
    if callable(getattr(opt, "train", None)) and callable(getattr(opt, "eval", None)):
        raise OptimizerError(
            "this optimizer exchanges the parameters of training and of evaluation itself, on all of them at once",
            got=f"a {type(opt).__name__} with `train()` and `eval()`",
            fix='leave `shard_optimizer` out, or write `faccel.init(mesh="dp_shard=-1")`, which shares its states too',
        )
    if hasattr(opt.step, "_wrapped_by_lr_sched"):
        raise OptimizerError(
            "a scheduler holds this optimizer already, and would not move the one that steps",
            got=f"a {type(opt).__name__}",
            fix="call `faccel.wrap_optimizer` first, and make the scheduler from what it returns",
        )
    return ShardedOptimizer(opt, ctx)


class ShardedOptimizer(ZeroRedundancyOptimizer):
    """A ZeroRedundancyOptimizer around any optimizer that treats each parameter on its own.

    Its state is that of the optimizer it was made from, whole on every rank, so that either loads the other's.
    """

    def __init__(self, opt: Optimizer, ctx: DistContext) -> None:
        groups, constructor = [dict(group) for group in opt.param_groups], _Part(opt)
        self._ctx = ctx
        super().__init__(groups, constructor, ctx.comm.group(DATA), **opt.defaults)  # pyright: ignore[reportArgumentType]

    def state_dict(self) -> dict[str, Any]:
        """Return the whole state, on the CPU. Collective."""
        mine = map_leaves(_to_cpu, self.optim.state_dict())
        self._all_state_dicts = all_or_error(
            lambda: mine,
            self._ctx,
            "give its part of the state of an optimizer",
            error=CheckpointError,
        )
        try:
            return super().state_dict()
        finally:
            self._all_state_dicts = []

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take this rank's part of a whole state."""
        saved: list[dict[str, Any]] = state_dict["param_groups"]
        sizes = [
            [len(group["params"]) for group in groups] for groups in (saved, self.param_groups)
        ]
        if sizes[0] != sizes[1]:
            raise OptimizerError(
                "this state is of an optimizer with other groups of parameters",
                got=f"groups of {sizes[0]}, for groups of {sizes[1]}",
                fix="make the optimizer from the model that the state belongs to, in the same groups",
            )
        number_of = {
            id(p): number
            for p, number in zip(_params(self.param_groups), _params(saved), strict=True)
        }
        own = self.optim.state_dict()["param_groups"]
        numbers = {
            number_of[id(p)]: i
            for i, p in zip(_params(own), _params(self.optim.param_groups), strict=True)
        }
        state = {
            numbers[number]: each
            for number, each in state_dict["state"].items()
            if number in numbers
        }
        packed = [
            group | {"params": mine["params"]} for group, mine in zip(saved, own, strict=True)
        ]
        self.optim.load_state_dict({"state": state, "param_groups": packed})
        _copy_options(self.optim.param_groups, self.param_groups)


def _params(groups: list[dict[str, Any]]) -> list[Any]:
    return [p for group in groups for p in group["params"]]


def _copy_options(source: list[dict[str, Any]], target: list[dict[str, Any]]) -> None:
    for mine, other in zip(source, target, strict=True):
        other.update({name: value for name, value in mine.items() if name != "params"})


def _to_cpu(leaf: Tree) -> Tree:
    return leaf.detach().cpu() if isinstance(leaf, torch.Tensor) else leaf


@attrs.frozen(eq=False)
class _Part:
    """Makes a copy of `opt` for a part of its parameters; no constructor does: AdamW's refuses its own `defaults`."""

    opt: Optimizer

    def __call__(self, groups: list[dict[str, Any]], **defaults: Any) -> Optimizer:
        own = {id(p) for p in _params(groups)}
        part = object.__new__(type(self.opt))
        part.__dict__.update(self.opt.__dict__)
        part.param_groups = groups
        part.state = defaultdict(
            dict, {p: state for p, state in self.opt.state.items() if id(p) in own}
        )
        return part
