"""Sharded parameters, gathered unit by unit: PyTorch's FSDP2, with replicas and tensor parallel.

The order of the steps is torchtitan's: tensor parallel, activation checkpointing, compilation,
sharding.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.optim import Optimizer

from faccel.backends.fsdp_fp8 import Fp8Scales, convert_layers, gather_as_bytes
from faccel.backends.fsdp_grads import sharded_grads
from faccel.backends.fsdp_layout import Layout, data_mesh, engine_mesh, expert_mesh
from faccel.backends.fsdp_param_hooks import ShardHooks, attach, gather_before_inference_mode
from faccel.backends.fsdp_precision import precision_policy, switch_autocast
from faccel.backends.fsdp_registration import Registration
from faccel.backends.fsdp_reset import reset_iteration
from faccel.backends.fsdp_second_order import SecondOrder
from faccel.backends.fsdp_unreduced import UnreducedGrads
from faccel.backends.shard_support import check_steps_shards
from faccel.comm.rank_errors import raise_naming_rank
from faccel.context import DistContext
from faccel.device_table import kind_of
from faccel.errors import ModelError
from faccel.mesh import WORLD
from faccel.parallel.activation_checkpoint import apply_checkpointing
from faccel.parallel.compilation import apply_compile
from faccel.parallel.eager_code import without_graph
from faccel.parallel.expert_parallel import shard_experts
from faccel.parallel.forward import call_method, forward_precision, to_fp32, with_precision
from faccel.parallel.layerwise_casting import refuse_stored_layers
from faccel.parallel.materialize import InitialValues
from faccel.parallel.param_hooks import hooks_of
from faccel.parallel.sync_states import broadcast_from_rank_0, check_same_structure
from faccel.parallel.transformer_engine import with_history
from faccel.plan import Plan
from faccel.protocols import Parallelism, RunMethod
from faccel.tree import Tree, flatten, has_inner_tensors, is_dtensor

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


# Leaves of an output through which no backward passes; of tensors, those without gradients.
_WITHOUT_TENSORS = (torch.Tensor, int, float, str, type(None))


class FsdpEngine(nn.Module):
    """A sharded model, and the state of its gradients that FSDP2 does not expose.

    Args:
        module: The user's module, which `shard_module` has sharded.
        plan: How the model runs.
        ctx: The context.

    Attributes:
        reduces_grads: Whether the next backward reduces gradients.
        unreduced: The gradients that backwards without reduction have accumulated.
        registration: Which parameters the modules have.
        shard_hooks: The hooks that users register on shards.
        second_order: What a backward through a backward needs.
        fp8_scales: The scales of weights that are gathered in fp8.
    """

    def __init__(self, module: nn.Module, plan: Plan, ctx: DistContext) -> None:
        super().__init__()
        self.module = module
        self.plan = plan
        self.ctx = ctx
        self.reduces_grads = True
        self.unreduced = UnreducedGrads(module)
        self.registration = Registration.of(module)
        self.fp8_scales = Fp8Scales(module)
        self.shard_hooks = ShardHooks.of(module)
        self.second_order = SecondOrder(
            module, self.registration, self.shard_hooks.fsdp_params, self._after_second_backward
        )

    def set_reduces_grads(self, *, on: bool) -> None:
        """Let backward reduce gradients, or only accumulate them."""
        self.reduces_grads = on
        cast("FSDPModule", self.module).set_requires_gradient_sync(on)

    @without_graph
    def run(self, method: str, *args: Tree, **kwargs: Tree) -> Tree:
        """Call a method of the module, with FSDP2's hooks; outputs are fp32."""
        self.recover()  # from a `loss.backward()` of the user that has raised
        self.fp8_scales.refresh()
        gather_before_inference_mode(self.module)
        self.registration.before_forward()
        try:
            with forward_precision(self.plan, self.ctx):
                output = self._call(method, args, kwargs)
        except BaseException as error:
            # The loop may continue, as after a batch that is too large: FSDP2 has not cleaned up.
            self.registration.after_forward(has_backward=False)
            if isinstance(error, RuntimeError):  # forward gathers parameters
                raise_naming_rank(error, "forward", WORLD, self.ctx.comm)
            raise
        self.registration.after_forward(has_backward=self._watch_backward(output))
        if self.ctx.compute_dtype is None:
            return output
        return to_fp32(output)

    def _watch_backward(self, output: Tree) -> bool:
        """Call `_before_backward` at the start of a backward through `output`; updates `output`.

        Returns:
            Whether a backward through `output` is possible.
        """
        if not torch.is_grad_enabled():
            return False
        has_backward = False
        for leaf in flatten(output)[0]:
            if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
                # A hook of an output runs before the hooks of the units, which accumulate. With
                # several outputs it runs several times: later calls change nothing.
                leaf.register_hook(self._before_backward)
                has_backward = True
            elif not isinstance(leaf, _WITHOUT_TENSORS):
                # An object of another class, such as a distribution, may contain such a tensor.
                has_backward = True
        return has_backward

    def _before_backward(self, grad: torch.Tensor) -> None:
        self.registration.before_backward()
        self.shard_hooks.before_backward()
        self.second_order.before_backward()
        self.unreduced.before_backward(reduces=self.reduces_grads)

    def _after_second_backward(self) -> None:
        if not self.reduces_grads:
            self.unreduced.add_placeholders()

    def recover(self) -> None:
        """Drop what a backward that has raised left. Updates the model."""
        state = cast("Any", self.module)._get_fsdp_state()
        if not state._state_ctx.post_backward_final_callback_queued:
            return  # that backward has not reached this model, or has ended
        self.unreduced.drop_all()
        self.second_order.reset()
        # What FSDP2 does at the end of a backward. Without gradients it reduces nothing.
        state._root_post_backward_final_callback()
        self.registration.after_forward(has_backward=False)

    def reset(self) -> None:
        """Drop all gradients, and what an unfinished forward or backward left."""
        self.unreduced.drop_all()
        self.second_order.reset()
        reset_iteration(self.module)
        self.registration.after_forward(has_backward=False)

    def _call(self, method: str, args: tuple[Tree, ...], kwargs: dict[str, Tree]) -> Tree:
        if method == "forward":  # FSDP2's hooks are hooks of `nn.Module`
            return call_method(self.module, method, *args, **kwargs)
        # As in torch's `register_fsdp_forward_method`, which would replace the user's method, and
        # does not take a submodule.
        state = cast("Any", self.module)._get_fsdp_state()
        args, kwargs = state._pre_forward(self.module, args, kwargs)
        output = call_method(self.module, method, *args, **kwargs)
        return state._post_forward(self.module, args, output)


def _wrap(module: nn.Module, plan: Plan, ctx: DistContext) -> tuple[nn.Module, RunMethod]:
    refuse_stored_layers(plan, ctx)
    check_same_structure(module, ctx, WORLD)
    layout = Layout.from_plan(module, plan, ctx).with_fp8(module, plan, ctx)
    shard_module(module, plan, layout, ctx)
    engine = FsdpEngine(module, plan, ctx)
    return engine, _run_of(engine, ctx)


def _run_of(engine: FsdpEngine, ctx: DistContext) -> RunMethod:
    # Autocast is inside of `engine.run`. Casts of inputs and outputs are outside, so that hooks of
    # FSDP2 see the tensors of the module.
    if ctx.param_dtype is None:
        return with_history(engine.run, engine.module, engine.plan, ctx)
    return with_precision(engine.run, ctx)


def shard_module(module: nn.Module, plan: Plan, layout: Layout, ctx: DistContext) -> None:
    """Shard `module`, which is the same on all ranks of a stage.

    Updates `module`; collective over the stage.
    """
    _check_divisible(module)
    hooks = hooks_of(module)
    _make_contiguous(module)
    # First, because all later steps take local slices: every rank must have the same values.
    values = InitialValues.of(module, ctx, "stage")
    convert_layers(module, layout, plan, ctx)
    if layout.tp_styles:
        # Before FSDP2, which shards the DTensors of `tp` once more, along dim 0.
        # The reverse is impossible: `parallelize_module` needs full parameters on each rank.
        from faccel.parallel.tensor_parallel import apply_tensor_parallel

        apply_tensor_parallel(module, layout.tp_styles, engine_mesh(ctx)["tp"])
    # Before compilation, so that a compiled graph contains the second forward.
    apply_checkpointing(module, layout.units, plan)
    # Before sharding: FSDP2's hooks stay outside the graphs, which they would break.
    apply_compile(module, layout.units, plan)
    _fully_shard(module, layout, plan, ctx)
    gather_as_bytes(module)
    # Last: of a model on meta, each rank now allocates its shards and one full tensor at a time.
    values.fill(module, ctx, "stage")
    attach(module, hooks, ctx)


def _check_divisible(module: nn.Module) -> None:
    """Raise for a quantized parameter whose class does not support shards.

    Raises:
        ModelError: There is one. Some classes do, such as torchao's `NF4Tensor`.
    """
    for name, param in module.named_parameters():
        if not has_inner_tensors(param):
            continue
        try:
            torch.chunk(param.detach(), 2)
        except (NotImplementedError, RuntimeError, AssertionError) as error:
            raise ModelError(
                f"`{name}` is quantized, and its class cannot be divided into shards",
                got=f"{type(param).__name__}{list(param.shape)} on a mesh that shards parameters",
                fix='replicate the model, with `faccel.init(mesh="dp_replicate=-1")`; adapters '
                "next to frozen quantized weights train there as on one process",
            ) from error


def _make_contiguous(module: nn.Module) -> None:
    """Give non-contiguous parameters, as of `torch.channels_last`, the memory that shards have.

    Convolutions still compute in the memory format of their inputs.
    """
    for param in module.parameters():
        if not param.is_contiguous():
            param.data = param.data.contiguous()


def _fully_shard(module: nn.Module, layout: Layout, plan: Plan, ctx: DistContext) -> None:
    from torch.distributed.fsdp import fully_shard

    policy_of = precision_policy(layout, plan, ctx)
    # Before sharding: FSDP2 then casts the inputs of a unit before autocast changes.
    switch_autocast(layout, plan, ctx)
    options = _options(plan, ctx)
    # Experts first: the units around them must not take their parameters for `data_mesh`.
    if layout.moes:
        shard_experts(layout.moes, policy_of, options, expert_mesh(ctx), ctx)
    if layout.ignored:
        # Looked up now, because tensor parallel has replaced parameters.
        params = dict(module.named_parameters(remove_duplicate=False))
        options["ignored_params"] = {params[name] for name in layout.ignored}
    # Inner units first: an outer one takes the parameters that no inner one has.
    for name, unit in layout.units.items():
        fully_shard(unit, mp_policy=policy_of(name), **options)
    # The root takes the parameters that no unit has, such as those of a final norm.
    fully_shard(module, mp_policy=policy_of(""), **options)
    if plan.fsdp.prefetch is not None:
        _set_prefetch(_units_in_order(module, layout), plan.fsdp.prefetch)


def _options(plan: Plan, ctx: DistContext) -> dict[str, Any]:
    """Return the arguments of `fully_shard` that are the same for all units."""
    from torch.distributed.fsdp import CPUOffloadPolicy

    options: dict[str, Any] = {
        # Gradients are averaged over all ranks of this mesh: 1/(R * S) * sum over R replicas and
        # S = dp_shard * cp ranks. `windows` weights losses by the same number.
        "mesh": data_mesh(ctx),
        "reshard_after_forward": plan.fsdp.reshard_after_forward,
    }
    if plan.offload:
        # Copies overlap with computation only if the memory of the host is pinned.
        options["offload_policy"] = CPUOffloadPolicy(
            pin_memory=kind_of(ctx.device).has_pinned_memory
        )
    return options


def _units_in_order(module: nn.Module, layout: Layout) -> list[nn.Module]:
    """Return the units in the order of `module.modules()`, which is usually that of forward."""
    # By `id`: `layout.units` has inner units first, which is not the order of execution.
    units = {id(unit) for unit in layout.units.values()}
    return [submodule for submodule in module.modules() if id(submodule) in units]


def _set_prefetch(units: Sequence[nn.Module], count: int) -> None:
    """Let each unit start to gather the next `count` units, in forward and in backward."""
    fsdp_units = cast("Sequence[FSDPModule]", units)
    for i, unit in enumerate(fsdp_units):
        # FSDP2 starts these gathers before the unit computes, so the two overlap.
        following = list(fsdp_units[i + 1 : i + 1 + count])
        preceding = list(fsdp_units[max(0, i - count) : i])
        unit.set_modules_to_forward_prefetch(following)
        # Backward runs the units in reverse order, so the nearest predecessor comes first.
        unit.set_modules_to_backward_prefetch(preceding[::-1])


def same_optimizer(opt: Optimizer, engine: nn.Module, ctx: DistContext) -> Optimizer:
    """Return `opt`: FSDP2 shards parameters in place, so optimizers need no engine.

    Raises:
        OptimizerError: `opt` cannot step shards.
    """
    check_steps_shards(opt, ctx)
    scales = cast("Any", engine).fp8_scales  # of this engine, or of a pipeline's
    scales.watch(opt)
    return opt


@contextmanager
def _grad_sync(engine: nn.Module, *, on: bool) -> Generator[None]:
    assert isinstance(engine, FsdpEngine)
    before = engine.reduces_grads
    engine.set_reduces_grads(on=on)
    try:
        yield
    finally:
        # Contexts nest: the inner one restores the value of the outer one.
        engine.set_reduces_grads(on=before)
        if not on:
            engine.unreduced.add_placeholders()


def sync_buffers(engine: nn.Module, ctx: DistContext) -> None:
    """Overwrite the buffers with those of the first rank of the stage. Collective."""
    # FSDP2 shards parameters only. Each rank updates its own copy of a buffer.
    buffers = dict(engine.named_buffers())
    if buffers:
        broadcast_from_rank_0(buffers, ctx, "stage")


def _rewrap(
    module: nn.Module, engine: nn.Module, plan: Plan, ctx: DistContext
) -> tuple[nn.Module, RunMethod]:
    assert isinstance(engine, FsdpEngine)
    ignored = Layout.from_plan(module, plan, ctx).ignored
    for name, param in module.named_parameters():
        if not is_dtensor(param) and name not in ignored:
            raise ModelError(
                "a model with sharded parameters cannot get new ones after `faccel.wrap`",
                got=f"`{name}`",
                fix="add layers and adapters first, and then write `model = faccel.wrap(net, ctx)`",
            )
    # FSDP2 reads `requires_grad` of the shards in each forward, so the engine stays.
    return engine, _run_of(engine, ctx)


FSDP = Parallelism(
    "sharded",
    _wrap,
    same_optimizer,
    _grad_sync,
    sync_buffers,
    grad_reducer=sharded_grads,
    rewrap=_rewrap,
)
