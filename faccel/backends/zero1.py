"""Optimizer states sharded over the data ranks (ZeRO-1): PyTorch's ZeroRedundancyOptimizer."""

from __future__ import annotations

import warnings
from collections import defaultdict

import attrs
from torch.optim import LBFGS, Optimizer

from faccel.backends.param_groups import (
    ParamGroups,
    check_no_scheduler,
    check_same_sizes,
    copy_options,
    params_of,
    to_cpu,
)
from faccel.comm.all_or_error import all_or_error
from faccel.context import DistContext
from faccel.errors import CheckpointError, OptimizerError
from faccel.mesh import DATA
from faccel.tree import Tree

with warnings.catch_warnings():
    # Importing it deprecates torch's functional optimizers, which are not used here.
    warnings.simplefilter("ignore", DeprecationWarning)
    from torch.distributed.optim import ZeroRedundancyOptimizer


def shard_optimizer(opt: Optimizer, ctx: DistContext) -> Optimizer:
    """Return an optimizer that steps as `opt` does, each data rank for its shard of the parameters.

    Raises:
        OptimizerError: `opt` needs all parameters at once, or a scheduler was made for it.
    """
    if isinstance(opt, LBFGS):
        raise OptimizerError(
            "LBFGS computes one direction from all parameters, so its states cannot be sharded",
            got="an LBFGS",
            fix="leave `shard_optimizer` out, or use an element-wise optimizer such as AdamW",
        )
    # Schedule-free optimizers (Defazio et al. 2024, arXiv:2405.15682) swap all parameters between
    # their training and evaluation values; each rank would swap its shard only.
    if callable(getattr(opt, "train", None)) and callable(getattr(opt, "eval", None)):
        raise OptimizerError(
            "this optimizer swaps all parameters in `train()` and `eval()`, so its states cannot "
            "be sharded",
            got=f"a {type(opt).__name__}",
            fix='leave `shard_optimizer` out, or write `faccel.init(mesh="dp_shard=-1")`, which '
            "shards its states too",
        )
    _check_no_numbered_overrides(opt)
    check_no_scheduler(opt)
    return ShardedOptimizer(opt, ctx)


def _check_no_numbered_overrides(opt: Optimizer) -> None:
    """Raise if bitsandbytes stores options under the numbers of parameters.

    A shard numbers its parameters from 0, so the options would apply to other parameters.

    Raises:
        OptimizerError: It does.
    """
    # Its `GlobalOptimManager`; of other optimizers there is none.
    manager = getattr(opt, "mng", None)
    if getattr(manager, "index2config", None):
        raise OptimizerError(
            "`GlobalOptimManager` of bitsandbytes has options for the numbers of parameters, which "
            "differ on the ranks that shard an optimizer",
            got=f"a {type(opt).__name__} after `register_parameters`",
            fix="call `override_config` after `register_parameters`, which stores options by "
            "parameter, or leave `shard_optimizer` out",
        )


class ShardedOptimizer(ZeroRedundancyOptimizer):
    """A ZeroRedundancyOptimizer around any optimizer that treats each parameter separately.

    Its state has the form of the original optimizer's state, so each loads the other's.
    """

    def __init__(self, opt: Optimizer, ctx: DistContext) -> None:
        # Copies: `Optimizer.__init__` writes into the dicts that it gets, which are the user's.
        groups = [dict(group) for group in opt.param_groups]
        self._ctx = ctx
        super().__init__(
            groups,
            # torch calls it with this rank's groups, in place of the optimizer's class.
            _CopyForShard(opt),  # pyright: ignore[reportArgumentType]
            ctx.comm.group(DATA),
            **opt.defaults,
        )

    def state_dict(self) -> dict[str, Tree]:
        """Return the full state, on the CPU. Collective."""
        state = to_cpu(self.optim.state_dict())
        # In place of `consolidate_state_dict`, after which only one rank has the states. Here every
        # rank gets all of them, in the private list that torch's `state_dict` merges.
        self._all_state_dicts = all_or_error(
            lambda: state,
            self._ctx,
            "collect its shard of the state of an optimizer",
            error=CheckpointError,
        )
        try:
            return super().state_dict()
        finally:
            # The list has a copy of all shards: it would stay in memory until the next save.
            self._all_state_dicts = []

    def load_state_dict(self, state_dict: dict[str, Tree]) -> None:
        """Load this rank's shard of a full state."""
        saved_groups: ParamGroups = state_dict["param_groups"]
        check_same_sizes(saved_groups, self.param_groups)
        # A state numbers parameters in the order of the groups; the shard has its own numbers.
        saved_numbers: dict[int, int] = {}
        for param, number in zip(
            params_of(self.param_groups), params_of(saved_groups), strict=True
        ):
            saved_numbers[id(param)] = number
        # Parameters that this rank does not step are left out: it has no memory for their states.
        shard_groups = self.optim.state_dict()["param_groups"]
        shard_state: dict[int, Tree] = {}
        for number, param in zip(
            params_of(shard_groups), params_of(self.optim.param_groups), strict=True
        ):
            saved_number = saved_numbers[id(param)]
            if saved_number in state_dict["state"]:
                shard_state[number] = state_dict["state"][saved_number]
        copy_options(saved_groups, shard_groups)
        self.optim.load_state_dict({"state": shard_state, "param_groups": shard_groups})
        # Schedulers read these groups; torch copies them to the shard's groups in each step.
        copy_options(self.optim.param_groups, self.param_groups)


@attrs.frozen(eq=False)
class _CopyForShard:
    """Copies `opt` for some of its parameters, as ZeroRedundancyOptimizer's `optimizer_class`.

    No constructor is called: AdamW's, for example, refuses its own `defaults`.
    """

    opt: Optimizer

    def __call__(self, groups: list[dict[str, Tree]], **defaults: Tree) -> Optimizer:
        shard = object.__new__(type(self.opt))
        # Hooks, options and caches of the user's optimizer stay. Groups and states are replaced.
        shard.__dict__.update(self.opt.__dict__)
        shard.param_groups = groups
        shard.state = defaultdict(dict)
        for param in params_of(groups):
            # There are states if the optimizer has stepped, or loaded some, before it was sharded.
            if param in self.opt.state:
                shard.state[param] = self.opt.state[param]
        return shard
