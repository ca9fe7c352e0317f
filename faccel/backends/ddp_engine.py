"""DistributedDataParallel whose gradients are reduced by every backward that reaches the model.

PyTorch's DDP prepares its reducer in `forward`: the next backward reduces, and every later one only
accumulates, without an error. So it does with a backward through a submodule that was called
directly. Here the reducer is prepared when a backward starts, and `grad_sync` decides at that time.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import Any
from weakref import WeakKeyDictionary

import attrs
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from faccel.backends.ddp_changes import StructureAtWrap
from faccel.backends.ddp_mean import average_grads
from faccel.backends.graph_search import reaches
from faccel.comm.rank_errors import raise_naming_rank
from faccel.context import DistContext
from faccel.errors import ModelError, OptimizerError
from faccel.mesh import DATA
from faccel.parallel.eager_code import without_graph
from faccel.parallel.forward import Methods, call_method
from faccel.parallel.sync_states import check_same_values
from faccel.plan import DdpConfig
from faccel.tree import Tree, flatten
from faccel.update_options import BackwardOptions

# Parameters are compared between ranks at the first update, and then at every 1000th.
_STEPS_BETWEEN_CHECKS = 1000


@attrs.define(eq=False)
class _GradState:
    """What happened to the gradients of one model since the last update.

    Args:
        in_scaled_backward: Whether `scaled_backward` runs, which has prepared the reducer.
        is_armed: Whether the next backward reduces.
        graph_task: The backward that last reached an output of the model; torch numbers them.
        has_local: Whether gradients were accumulated that are not reduced.
        averages_here: Whether this update's backwards are averaged by `average_grads`.
        num_averages: How often `average_grads` has run.
        is_ordered: Whether DDP has seen the order of the gradients, by which it rebuilds buckets.
        marks: The gradients before a backward that the reducer does not reduce.
        stats: The reducer's statistics before a backward.
        has_failed: Whether a backward has raised before the reducer was finished.
        num_checks: Number of updates that were checked.
        is_replaced: Whether `rewrap` has made another engine.
        used: The state of the gradients when an optimizer last stepped.
    """

    in_scaled_backward: bool = False
    is_armed: bool = False
    graph_task: int = -1
    has_local: bool = False
    averages_here: bool = False
    num_averages: int = 0
    is_ordered: bool = False
    marks: list[tuple[int, int]] = attrs.field(factory=list)
    stats: list[int] = attrs.field(factory=list)
    has_failed: bool = False
    num_checks: int = 0
    is_replaced: bool = False
    used: WeakKeyDictionary[Optimizer, tuple[int, list[int]]] = attrs.field(
        factory=WeakKeyDictionary
    )


class DdpEngine(DistributedDataParallel):
    """DistributedDataParallel that is prepared by each backward; a `GradReducer`.

    Args:
        module: The user's module.
        options: The options of the plan.
        ctx: The context.
        **arguments: Of DistributedDataParallel.
    """

    def __init__(
        self, module: nn.Module, options: DdpConfig, ctx: DistContext, **arguments: Any
    ) -> None:
        # DDP's hooks run in `forward` only. `Methods` calls any method of the module through it.
        super().__init__(Methods(module), **arguments)
        self.ctx = ctx
        self.shards_optimizer = options.shard_optimizer
        self.syncs_buffers = options.forward_sync_buffers
        self.grads = _GradState()
        self.at_wrap = StructureAtWrap.of(module)
        norms = torch.nn.modules.batchnorm._NormBase  # pyright: ignore[reportPrivateUsage]
        self._norms = [norm for norm in module.modules() if isinstance(norm, norms)]

    @property
    def user_module(self) -> nn.Module:
        """The user's module."""
        return self.module.module  # type: ignore[return-value]

    @property
    def param_ids(self) -> AbstractSet[int]:
        """The `id` of each parameter that the reducer has registered."""
        return self.at_wrap.params.keys()

    def name_of(self, param: torch.Tensor) -> str | None:
        """Return the name of a parameter that the model has now, else None."""
        return self.at_wrap.name_of(param)

    @without_graph
    def run(self, method: str, *args: Tree, **kwargs: Tree) -> Tree:
        """Call a method of the module; a backward through its outputs reduces gradients."""
        if self.grads.is_replaced:
            raise ModelError(
                "`model` was replaced by `faccel.rewrap`",
                got="a call of the old `WrappedModel`",
                fix="write `model = faccel.rewrap(model, ctx)`, and use the new one everywhere",
            )
        # Without gradients there is nothing to reduce. Called without DDP, so that ranks may
        # evaluate different numbers of batches.
        if not torch.is_grad_enabled():
            return call_method(self.user_module, method, *args, **kwargs)
        self.grads.averages_here = False
        self._check_complete()
        try:
            output = self(method, *args, **kwargs)
        except RuntimeError as error:  # forward may rebuild buckets, which communicates
            raise_naming_rank(error, "forward", DATA, self.ctx.comm)
        if self.require_backward_grad_sync:
            self.grads.is_armed = True
        self._watch(output)
        return output

    def _watch(self, output: Tree) -> None:
        """Call `_on_backward` when a backward reaches `output`. Updates `output`."""
        leaves: Sequence[Tree] = (output,)
        if not isinstance(output, torch.Tensor):
            leaves = flatten(output)[0]
        for leaf in leaves:
            # A method may return a parameter itself, on which a hook would stay.
            if isinstance(leaf, torch.Tensor) and leaf.grad_fn is not None:
                leaf.register_hook(self._on_backward)

    def _on_backward(self, grad: torch.Tensor) -> None:
        state = self.grads
        # Outputs of one backward call this once each: preparing again would drop what was counted.
        graph_task = torch._C._current_graph_task_id()  # pyright: ignore
        if graph_task == state.graph_task:
            return
        state.graph_task = graph_task
        if state.in_scaled_backward:
            state.is_armed = False
            return
        state.is_ordered = True
        # The user's own `loss.backward()`.
        if not self.require_backward_grad_sync:
            self._disarm()
            state.has_local = True
            return
        self._arm_without_loss()
        if self._has_buffers_to_sync():
            engine = torch.autograd.Variable._execution_engine  # pyright: ignore
            engine.queue_callback(self.copy_buffers_of_rank_0)

    def _arm_without_loss(self) -> None:
        if self.find_unused_parameters and not self.static_graph:
            # DDP has searched the graph of the outputs in forward, for one backward.
            if not self.grads.is_armed:
                raise ModelError(
                    "a second backward over the same forward would not be reduced",
                    got="`loss.backward()` with `find_unused_parameters`",
                    fix="write `scaler = faccel.scaled_backward(loss, scaler, ctx)`",
                )
        else:
            self._rebuild_buckets()
            self.reducer.prepare_for_backward([])
        self.grads.is_armed = False

    def _rebuild_buckets(self) -> None:
        """Let DDP order its buckets after the first backward. Collective that once.

        DDP does so in forward, and fails where two backwards come first.
        """
        self._check_complete()
        try:
            # An attribute of DDP, which its forward sets, too.
            self._has_rebuilt_buckets |= self.reducer._rebuild_buckets()
        except RuntimeError as error:
            raise_naming_rank(error, "backward", DATA, self.ctx.comm)

    def _rebuild_buckets_of(self, loss: torch.Tensor) -> None:
        """Rebuild buckets before a second backward, if it reaches the model. Collective that once.

        A rank may have a model that the others have freed: the garbage collector must not decide
        what ranks communicate.
        """
        self._check_complete()
        if not self.grads.is_ordered or self._has_rebuilt_buckets:
            return  # nearly always: DDP rebuilds them in the second forward
        # DDP rebuilds none if some parameters may have no gradients.
        if self.find_unused_parameters and not self.static_graph:
            return
        if reaches(loss, self.param_ids):
            self._rebuild_buckets()

    def _reset_reducer(self) -> None:
        """Drop what a backward has prepared or begun, and the order of the buckets."""
        self.reducer._reset_state()
        self._has_rebuilt_buckets = False
        self.grads.is_ordered = False

    def _disarm(self) -> None:
        """Let the next backward accumulate only. Updates the reducer."""
        if self.grads.is_armed and not self.static_graph:
            self._reset_reducer()
        self.grads.is_armed = False

    def before_backward(self, loss: torch.Tensor, options: BackwardOptions) -> None:
        """Prepare the reducer for a backward of `loss`."""
        state = self.grads
        state.in_scaled_backward = True
        # Several backwards over one forward may each reach some of the parameters only, and DDP
        # waits for all of them.
        if not options.is_plain and self.require_backward_grad_sync:
            self._check_several_backwards()
            state.averages_here = True
        if state.averages_here or not self.require_backward_grad_sync:
            self._disarm()
            state.marks = self._mark_grads()
            state.stats = self.reducer.get_backward_stats()
            return
        self._rebuild_buckets_of(loss)
        if state.has_local or self._has_buffers_to_sync() or not state.is_ordered:
            state.stats = self.reducer.get_backward_stats()
        # The graph of the loss, not that of one output: a loss may use several calls.
        outputs = [loss] if self.find_unused_parameters else []
        self.reducer.prepare_for_backward(outputs)
        state.is_armed = True

    def graph_inputs(self, inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Return `inputs`: the graph has the user's parameters."""
        return inputs

    def after_backward(self, options: BackwardOptions) -> None:
        """Average what the reducer did not, and copy rank 0's buffers. Collective."""
        state = self.grads
        state.in_scaled_backward = False
        if state.averages_here:
            self._average(options)
        elif not self.require_backward_grad_sync:
            is_reduced = state.stats != self.reducer.get_backward_stats()
            if not is_reduced and state.marks != self._mark_grads():
                state.has_local = True
        # Asked in this order: an ordinary update needs no statistics.
        elif (
            state.has_local or self._has_buffers_to_sync() or not state.is_ordered
        ) and state.stats != self.reducer.get_backward_stats():
            state.is_ordered = True
            state.has_local = False
            self._sync_after(options)

    def after_failed_backward(self) -> None:
        """Note that gradients are incomplete, if the backward has reached the model."""
        state = self.grads
        state.in_scaled_backward = False
        state.is_armed = False
        try:
            self.reducer._check_reducer_finalized()
        except RuntimeError:
            # Its all-reduces may still run in the memory of the next ones: it cannot be used again.
            state.has_failed = True
        if not self.require_backward_grad_sync or state.averages_here:
            state.has_local = state.has_local or state.marks != self._mark_grads()

    def discard(self) -> None:
        """Drop all gradients, and what an unfinished backward left in the reducer."""
        # Every rank builds its buckets again: some may not have built them before the failure.
        self._reset_reducer()
        self.grads = _GradState(num_checks=self.grads.num_checks)
        for param in self.parameters():
            param.grad = None

    def _average(self, options: BackwardOptions) -> None:
        state = self.grads
        if not self.require_backward_grad_sync:
            state.has_local = state.has_local or state.marks != self._mark_grads()
            return
        changed: list[bool] = []
        for before, after in zip(state.marks, self._mark_grads(), strict=True):
            changed.append(after != before or state.has_local)
        average_grads(self.at_wrap.by_name(), changed, self.ctx)
        state.num_averages += 1
        state.has_local = False
        self._sync_after(options)

    def _sync_after(self, options: BackwardOptions) -> None:
        # A retained graph may need the buffers as they are.
        if self._has_buffers_to_sync() and not options.keeps_graph:
            self.copy_buffers_of_rank_0()

    def _mark_grads(self) -> list[tuple[int, int]]:
        """Return marks that change where a gradient is accumulated."""
        marks: list[tuple[int, int]] = []
        for param in self.at_wrap.params.values():
            if param.grad is None:
                marks.append((0, 0))
            else:
                marks.append((id(param.grad), param.grad._version))
        return marks

    def _has_buffers_to_sync(self) -> bool:
        # `Join` counts the collectives of forward, so inside of it DDP copies the buffers there.
        return self.syncs_buffers and bool(self.modules_buffers) and not self._join_config.enable

    def copy_buffers_of_rank_0(self) -> None:
        """Overwrite the buffers by those of rank 0. Updates the module; collective.

        Once per update, so that between updates all replicas evaluate the same model.
        """
        statistics = [buffer for norm in self._norms for buffer in norm.buffers(recurse=False)]
        # Graphs of other forwards hold these statistics. Their backward does not use the values in
        # training mode, and in evaluation mode all ranks have the same ones.
        with torch.autograd._unsafe_preserve_version_counter(tuple(statistics)):  # pyright: ignore
            self._sync_buffers()

    def check_step(self, opt: Optimizer) -> None:
        """Raise if the gradients or the parameters of the replicas may differ."""
        state = self.grads
        # Inside `grad_sync(model, on=False)` replicas train for themselves, as in local SGD.
        if not self.require_backward_grad_sync:
            return
        self._check_complete()
        grads = (state.num_averages, self.reducer.get_backward_stats())
        if state.has_local or grads == state.used.get(opt):
            raise self._unreduced_error()
        if self._join_config.enable:  # ranks make different numbers of updates
            return
        if state.num_checks % _STEPS_BETWEEN_CHECKS == 0:
            check_same_values(self.user_module, self.ctx, DATA)
        state.num_checks += 1

    def after_step(self, opt: Optimizer) -> None:
        """Record that `opt` has used the present gradients."""
        state = self.grads
        state.averages_here = False
        if self.require_backward_grad_sync:
            state.used[opt] = (state.num_averages, self.reducer.get_backward_stats())

    def _check_complete(self) -> None:
        """Raise if the last backward has reached some parameters only."""
        try:
            self.reducer._check_reducer_finalized()
        except RuntimeError as error:
            raise self._unused_error() from error

    def _check_several_backwards(self) -> None:
        if self.static_graph or self._join_config.enable:
            raise ModelError(
                "`retain_graph`, `create_graph` and `inputs` need one backward per forward here",
                got="`static_graph=True`, or a backward inside of `join`",
                fix='leave `static_graph` out, and train with `tail="pad"` instead of `join`',
            )

    def _unused_error(self) -> ModelError:
        if self.grads.has_failed:
            return ModelError(
                "the last backward through `model` has raised, so its gradients are incomplete",
                got="another call after an exception in backward",
                fix="write `opt.zero_grad()` and `model = faccel.rewrap(model, ctx)` where you "
                "catch the exception, on all ranks",
            )
        change = self.at_wrap.change()
        if change is not None:
            return ModelError(change.problem, got=change.got, fix=change.fix)
        return ModelError(
            "some parameters took no part in the last loss, so DDP waits for their gradients",
            got=self.at_wrap.without_grad(),
            fix="use their outputs in the loss, or write `faccel.wrap(model, ctx, plan=faccel.Plan("
            "ddp=faccel.parallel.DdpConfig(find_unused_parameters=True)))`",
        )

    def _unreduced_error(self) -> OptimizerError:
        change = self.at_wrap.change()
        if change is not None:
            return OptimizerError(change.problem, got=change.got, fix=change.fix)
        return OptimizerError(
            "the gradients of `opt` are not reduced: replicas would drift apart",
            got="backwards inside of `grad_sync(model, on=False)`, or `loss.backward()` without a "
            "call of the wrapped model",
            fix="write `scaler = faccel.scaled_backward(loss, scaler, ctx)`, the last one with "
            "`grad_sync(model, on=True)`; for local SGD, call `optimizer_step` inside of "
            "`grad_sync(model, on=False)`, too",
        )
