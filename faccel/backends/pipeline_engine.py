"""The stages of one rank of a pipeline, and the shapes of the tensors between stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs
import torch
import torch.distributed as dist
from torch import nn

from faccel.backends.fsdp_fp8 import Fp8Scales
from faccel.backends.fsdp_param_hooks import ShardHooks
from faccel.backends.fsdp_registration import free_gathered
from faccel.backends.fsdp_reset import reset_iteration
from faccel.comm.objects import broadcast_objects
from faccel.context import DistContext
from faccel.errors import ModelError
from faccel.parallel.pipeline_forward import OutputStructure
from faccel.parallel.pipeline_stages import StageModule, StageRanks
from faccel.plan import PipelineConfig
from faccel.tree import Tree, flatten, map_leaves

if TYPE_CHECKING:
    from faccel.parallel.pipeline_schedules import Stage

TensorMeta = tuple[tuple[int, ...], torch.dtype]
"""The shape and dtype of a tensor."""


@attrs.frozen(eq=False)
class StageInputs:
    """The arguments of a model for one micro-batch.

    Args:
        args: Positional arguments, for the first stage.
        kwargs: Keyword arguments, for the first stage.
    """

    args: tuple[Tree, ...]
    kwargs: Mapping[str, Tree]

    def key(self) -> str:
        """Return a string that is equal for inputs of the same structure, shapes and dtypes."""

        def leaf_key(leaf: Tree) -> TensorMeta | None:
            if isinstance(leaf, torch.Tensor):
                return _meta_of(leaf)
            return None  # other values change no shape

        return str(map_leaves(leaf_key, [list(self.args), dict(self.kwargs)]))


@attrs.frozen(eq=False)
class TiedParam:
    """A parameter that stages of several ranks have; their gradients are added.

    Args:
        name: Its first name on this rank.
        names: Its names in all stages, in the order of the stages.
        group: The ranks that have it.
        copy_of: The name of its first copy, if that is on another rank.
    """

    name: str
    names: Sequence[str]
    group: dist.ProcessGroup
    copy_of: str | None


class PipelineEngine(nn.Module):
    """The stages of this rank, each sharded.

    Args:
        stage_modules: The stages of this rank in order.
        plan: How the pipeline runs.
        stage_ranks: Which rank has which stages.
        tied: The parameters that stages of other ranks have, too.
        ctx: The context.
        has_tied: Whether stages of any ranks have a parameter in common; equal on all ranks.
        loss_dtype: The dtype of losses. Every rank needs it to receive them, also one without
            parameters.

    Attributes:
        has_run: Whether a window has run.
        shard_hooks: The hooks that users register on shards.
        fp8_scales: The scales of weights that are gathered in fp8.
    """

    def __init__(
        self,
        stage_modules: Sequence[StageModule],
        plan: PipelineConfig,
        stage_ranks: StageRanks,
        tied: Sequence[TiedParam],
        ctx: DistContext,
        *,
        has_tied: bool,
        loss_dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.has_tied = has_tied
        self.loss_dtype = loss_dtype
        self.stage_modules = nn.ModuleList(stage_modules)
        self.plan = plan
        self.stage_ranks = stage_ranks
        self.tied = tuple(tied)
        self.ctx = ctx
        self.pp_rank = ctx.comm.rank("pp")
        self.pp_size = ctx.comm.size("pp")
        self._own_numbers = stage_ranks.stages_of(self.pp_rank)
        self.has_run = False
        self.shard_hooks = ShardHooks.of(self)
        self.fp8_scales = Fp8Scales(self)
        # By the number of the shapes in training, and by the key of the inputs in inference, where
        # every rank has the inputs: training and evaluation batches alternate.
        self._metas: dict[int | str, list[list[TensorMeta]]] = {}
        self._numbers: dict[str, int] = {}

    def reset(self) -> None:
        """Drop what an unfinished window left. Every rank calls it after a failure of one of them.

        The shapes between stages, too: a rank may have been interrupted before it got them.
        """
        self._metas.clear()
        self._numbers.clear()
        reset_iteration(self)

    def parameter(self, name: str) -> torch.Tensor:
        """Return a parameter of a stage of this rank by the user's name."""
        for stage_module in self.stage_modules:
            for param_name, param in stage_module.named_parameters():
                if param_name == name:
                    return param
        raise KeyError(name)

    def number_of_shapes(self, inputs: StageInputs) -> int:
        """Return the number of the shapes of `inputs`, on the first rank: 0 for the first ones."""
        return self._numbers.setdefault(inputs.key(), len(self._numbers))

    @property
    def runs_model(self) -> bool:
        """Whether each stage needs the inputs of the model, for its forward."""
        return self.plan.forward == "model"

    @property
    def structure(self) -> OutputStructure | None:
        """The structure of the output, on the rank of the last stage; None if a stage calls it."""
        last = self.stage_modules[-1]
        assert isinstance(last, StageModule)
        return last.structure

    def join_output(self, output: Any) -> Tree:
        """Return the output of the model from that of the last stage, which this rank has."""
        structure = self.structure
        if structure is None:
            return output
        return structure.join(output)

    def arguments(
        self, micro_batches: Sequence[StageInputs]
    ) -> tuple[list[tuple[Tree, ...]], list[dict[str, Tree]]]:
        """Return the arguments that torch passes to the first stage for each micro-batch."""
        if self.runs_model:  # stages take the inputs themselves
            return [() for _ in micro_batches], [{} for _ in micro_batches]
        args = [micro_batch.args for micro_batch in micro_batches]
        return args, [dict(micro_batch.kwargs) for micro_batch in micro_batches]

    def make_training_stages(self, number: int, inputs: Sequence[StageInputs]) -> list[Stage]:
        """Return torch's stages for micro-batches, which the first rank has.

        Collective over the pipeline if `number`, from the first rank, is a new one.
        """
        return self._make_stages(number, inputs, trains=True)

    def make_inference_stages(self, inputs: Sequence[StageInputs]) -> list[Stage]:
        """Return torch's stages for micro-batches, which every rank has.

        Collective over the pipeline if the inputs have new shapes.
        """
        return self._make_stages(inputs[0].key(), inputs, trains=False)

    def _make_stages(
        self, key: int | str, inputs: Sequence[StageInputs], *, trains: bool
    ) -> list[Stage]:
        """Find the shapes between the stages by one forward without gradients, where they are new.

        torch would find them by a forward and a backward in every window, which clears the
        gradients.
        """
        from faccel.parallel.pipeline_schedules import Stage  # torch's pipelining is slow to import

        if key not in self._metas:
            self._metas[key] = self._find_metas(inputs[0])
        metas = self._metas[key]
        stages: list[Stage] = []
        for number, stage_module in zip(self._own_numbers, self.stage_modules, strict=True):
            # New stages for each window: the shapes that torch's stages send are fixed.
            stage = Stage(
                stage_module,
                number,
                self.stage_ranks.num_stages,
                self.ctx.device,
                # `metas` has one entry more than stages: stage `i` maps entry `i` to `i + 1`.
                _meta_tensors(metas[number], trains=trains),
                _meta_tensors(metas[number + 1], trains=trains),
                group=self.ctx.comm.group("pp"),
            )
            stage.micro_batches = [(item.args, item.kwargs) for item in inputs]
            # `Schedule.step` does these two, and `_step_microbatches` does not.
            stage.has_backward = trains
            stage.clear_runtime_states()
            stages.append(stage)
        return stages

    def _find_metas(self, inputs: StageInputs) -> list[list[TensorMeta]]:
        """Return the shapes before the first stage, between the stages and after the last."""
        (args,), (kwargs,) = self.arguments([inputs])
        # In training only the first rank has them.
        own_metas = [_meta_of(arg) for arg in args]
        metas: list[list[TensorMeta]] = [
            broadcast_objects([own_metas], self.ctx, src=0, axis="pp")[0]
        ]
        # One stage after the other: the shapes of a stage depend on those of the stage before it.
        for number in range(self.stage_ranks.num_stages):
            output: list[TensorMeta | str] = []
            src = self.stage_ranks.rank_of(number)
            if src == self.pp_rank:
                index = self._own_numbers.index(number)
                output = self._run_for_shapes(index, args, kwargs, inputs)
            # Checked after the broadcast, so that every rank raises the same error.
            stage_metas = _only_metas(
                broadcast_objects([output], self.ctx, src=src, axis="pp")[0], number
            )
            metas.append(stage_metas)
            # Zeros, because an integer output may be an index, for which empty memory is invalid.
            args = tuple(
                torch.zeros(shape, dtype=dtype, device=self.ctx.device)
                for shape, dtype in stage_metas
            )
        return metas

    def _run_for_shapes(
        self, index: int, args: tuple[Tree, ...], kwargs: Mapping[str, Tree], inputs: StageInputs
    ) -> list[TensorMeta | str]:
        """Run a stage in evaluation mode, so that it changes no statistics."""
        stage_module = self.stage_modules[index]
        assert isinstance(stage_module, StageModule)
        modules = list(stage_module.modules())
        if stage_module.stage_forward is not None:
            modules += stage_module.stage_forward.side_modules
        # One by one: `train()` would also change modules that the user has set to evaluation mode.
        modes = {module: module.training for module in modules}
        stage_module.micro_batch = (inputs.args, inputs.kwargs)
        try:
            for module in modules:
                module.training = False
            with torch.no_grad():
                output = _first_output(stage_module, args, kwargs)
        finally:  # a stage that fails here, such as out of memory, is trained in the next attempt
            for module, mode in modes.items():
                module.training = mode
        free_gathered(stage_module)
        if not isinstance(output, tuple):
            output = (output,)
        return [_meta_or_type(value) for value in output]


def _first_output(
    stage_module: StageModule, args: tuple[Tree, ...], kwargs: Mapping[str, Tree]
) -> Tree:
    """Run a stage for the first time, and check that it can run the forward of its model."""
    if stage_module.stage_forward is None:
        return stage_module(*args, **kwargs)
    with stage_module.stage_forward.all_called():
        output = stage_module(*args, **kwargs)
    _check_not_poisoned(stage_module, args, output)
    return output


def _check_not_poisoned(stage_module: StageModule, args: tuple[Tree, ...], output: Tree) -> None:
    """Raise if a stage uses what modules of earlier stages return, which is NaN.

    Raises:
        ModelError: It does.
    """
    if not _has_nan(output):
        return
    assert stage_module.stage_forward is not None
    # A NaN of another origin, such as a mean over no labels, stays one with zeros instead.
    stage_module.stage_forward.poison_value = 0.0
    try:
        is_poisoned = not _has_nan(stage_module(*args))
    finally:
        stage_module.stage_forward.poison_value = float("nan")
    if is_poisoned:
        raise ModelError(
            "a stage of the pipeline uses values of an earlier stage, other than the first "
            "argument of its first module",
            got=f"a stage that begins with `{stage_module.first_name}`",
            fix="name other modules in `split`, or use a mesh without `pp`",
        )


def _has_nan(output: Tree) -> bool:
    for leaf in flatten(output)[0]:
        if isinstance(leaf, torch.Tensor) and bool(leaf.isnan().any()):
            return True
    return False


def _meta_of(tensor: Any) -> TensorMeta:
    return tuple(tensor.shape), tensor.dtype


def _meta_or_type(value: object) -> TensorMeta | str:
    if isinstance(value, torch.Tensor):
        return _meta_of(value)
    return f"a {type(value).__name__}"


def _only_metas(output: Sequence[TensorMeta | str], number: int) -> list[TensorMeta]:
    """Return the output of a stage; all of its values must be tensors."""
    metas: list[TensorMeta] = []
    for meta in output:
        if isinstance(meta, str):
            raise ModelError(
                f"stage {number} of the pipeline must return a tensor or a tuple of tensors",
                got=meta,
                fix="let each module of the chain return a tensor, or a tuple of tensors",
            )
        metas.append(meta)
    return metas


def _meta_tensors(metas: Sequence[TensorMeta], *, trains: bool) -> tuple[torch.Tensor, ...]:
    tensors: list[torch.Tensor] = []
    for shape, dtype in metas:
        # A stage sends gradients for these tensors only; integer tensors have none.
        requires_grad = trains and dtype.is_floating_point
        tensors.append(torch.empty(shape, dtype=dtype, device="meta", requires_grad=requires_grad))
    return tuple(tensors)
