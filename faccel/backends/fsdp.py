"""Parameters shared by the ranks, gathered unit by unit: torch's FSDP2, with replicas (HSDP) and tensor parallel.

The order is that of torch's composition: tensor parallel, activation checkpointing, compilation, sharding.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import attrs
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from faccel.comm.rank_errors import raise_naming_rank
from faccel.context import DistContext
from faccel.errors import ModelError
from faccel.parallel.activation_checkpoint import (
    apply_checkpointing,
    apply_compile,
    check_has_units,
)
from faccel.parallel.expert_parallel import moes_of, shard_experts
from faccel.parallel.forward import call_method, to_fp32
from faccel.parallel.materialize import InitialValues
from faccel.parallel.moe import MoE
from faccel.parallel.sync_states import check_same_structure, broadcast_from_rank_0
from faccel.parallel.units import matching, units_of
from faccel.plan import Plan
from faccel.protocols import WORLD, Parallelism, RunMethod


def _wrap(module: nn.Module, plan: Plan, ctx: DistContext) -> tuple[nn.Module, RunMethod]:
    check_same_structure(module, ctx, WORLD)
    shard_module(module, plan, Layout.of(module, plan, ctx), ctx)
    _forgets(module, module)
    return module, _runner(module, ctx)


@attrs.frozen(eq=False)
class Layout:
    """What a plan means for one model, found and checked before anything is moved.

    Args:
        units: Sharding units by name, inner ones first.
        cuts: Style of tensor parallelism by module name.
        ignored: Names of parameters that are left whole.
        exact: Names of units that compute in fp32.
        moes: Mixtures of experts by name, whose experts are spread over the axis `ep`.
    """

    units: Mapping[str, nn.Module]
    cuts: Mapping[str, str]
    ignored: frozenset[str]
    exact: frozenset[str]
    moes: Mapping[str, MoE]

    @classmethod
    def of(cls, module: nn.Module, plan: Plan, ctx: DistContext) -> Layout:
        """Read `plan` for a whole model."""
        moes = moes_of(module, ctx.mesh.spec)
        within = {id(moe.experts) for moe in moes.values()}  # they are units of their own
        units = {
            name: unit for name, unit in units_of(module, plan).items() if id(unit) not in within
        }
        named = dict(module.named_parameters(remove_duplicate=False))
        meant = {
            id(named[n])
            for pattern in plan.fsdp.ignored
            for n in matching(pattern, named, "parameter")
        }
        ignored = (name for name, p in named.items() if id(p) in meant)  # under each of its names
        check_has_units(units, plan.activation_checkpoint)
        for name, p in named.items():
            if p.ndim == 0 and id(p) not in meant:
                fix = "give it the shape [1], or name it in `fsdp=faccel.parallel.FsdpConfig(ignored=...)`"
                raise ModelError(
                    "a parameter that is a scalar cannot be shared", got=f"`{name}`", fix=fix
                )
        exact = (
            name for pattern in plan.fsdp.fp32_units for name in matching(pattern, units, "unit")
        )
        return cls(units, _cuts(module, plan, ctx), frozenset(ignored), frozenset(exact), moes)

    def below(self, names: Sequence[str]) -> Layout:
        """Return what concerns the modules of these names and those inside of them."""

        def inside(name: str) -> bool:
            return any(name == each or name.startswith(f"{each}.") for each in names)

        units = {name: unit for name, unit in self.units.items() if inside(name)}
        cuts = {name: style for name, style in self.cuts.items() if inside(name)}
        moes = {name: moe for name, moe in self.moes.items() if inside(name)}
        return attrs.evolve(self, units=units, cuts=cuts, moes=moes)


def shard_module(module: nn.Module, plan: Plan, layout: Layout, ctx: DistContext) -> None:
    """Shard `module`, which the ranks of a stage have alike. Updates `module`; collective over the stage."""
    values = InitialValues.of(module, ctx, "stage")
    if layout.cuts:
        from faccel.parallel.tensor_parallel import apply_tensor_parallel

        apply_tensor_parallel(module, layout.cuts, mesh_of(ctx)["tp"])
    apply_checkpointing(module, layout.units, plan.activation_checkpoint)
    apply_compile(module, layout.units, plan)
    _fully_shard(module, layout, plan, ctx)
    values.fill(module, ctx, "stage")


def _cuts(module: nn.Module, plan: Plan, ctx: DistContext) -> Mapping[str, str]:
    if ctx.mesh.spec.tp == 1:
        return {}
    from faccel.parallel.tensor_parallel import styles_of

    return styles_of(module, plan, ctx.mesh.spec.tp)


def mesh_of(ctx: DistContext) -> DeviceMesh:
    """Return torch's mesh that engines use: the ranks that share parameters are one axis, whatever else they share.

    With experts they are two: `ep`, and `ep_storage`, those that hold the same ones.
    """
    spec = ctx.mesh.spec
    return _mesh(
        ctx,
        {"ep_storage": spec.dp_shard * spec.cp // spec.ep, "ep": spec.ep} if spec.ep > 1 else None,
    )


def data_mesh(ctx: DistContext) -> DeviceMesh:
    """Return the part of it over which parameters are sharded, and replicated where there are several replicas."""
    mesh = _mesh(
        ctx
    )  # with experts, of its own: torch is about to forget how dims of one are joined
    return mesh["dp_replicate", "storage"] if ctx.mesh.spec.dp_replicate > 1 else mesh["storage"]


def _mesh(ctx: DistContext, storage: Mapping[str, int] | None = None) -> DeviceMesh:
    spec = ctx.mesh.spec
    storage = storage or {"storage": spec.dp_shard * spec.cp}
    outer, inner = {"pp": spec.pp} if spec.pp > 1 else {}, {"tp": spec.tp} if spec.tp > 1 else {}
    return ctx.mesh.device_mesh_of({**outer, "dp_replicate": spec.dp_replicate, **storage, **inner})


def _fully_shard(module: nn.Module, layout: Layout, plan: Plan, ctx: DistContext) -> None:
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    low, high = ctx.compute_dtype, None if ctx.compute_dtype is None else torch.float32
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=high)
    in_fp32 = MixedPrecisionPolicy(
        param_dtype=high, reduce_dtype=high
    )  # its inputs are brought there, too
    units = layout.units

    def policy_of(name: str) -> MixedPrecisionPolicy:
        inside = [each for each in units if name == each or name.startswith(f"{each}.")]
        return (
            in_fp32 if layout.exact.intersection(inside[:1]) else policy
        )  # inner units come first

    options: dict[str, Any] = {
        "mesh": data_mesh(ctx),
        "reshard_after_forward": plan.fsdp.reshard_after_forward,
    }
    if plan.offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=ctx.device.type == "cuda")
    if layout.moes:
        shard_experts(layout.moes, policy_of, options, mesh_of(ctx), ctx)
    if layout.ignored:
        options["ignored_params"] = {
            p for name, p in module.named_parameters() if name in layout.ignored
        }
    for name, unit in units.items():
        fully_shard(unit, mp_policy=policy_of(name), **options)
    fully_shard(module, mp_policy=policy, **options)
    if plan.fsdp.prefetch is not None:
        chosen = {id(unit) for unit in units.values()}
        _prefetch([each for each in module.modules() if id(each) in chosen], plan.fsdp.prefetch)


def _prefetch(units: list[Any], count: int) -> None:
    for i, unit in enumerate(units):
        unit.set_modules_to_forward_prefetch(units[i + 1 : i + 1 + count])
        unit.set_modules_to_backward_prefetch(units[max(0, i - count) : i][::-1])


def _runner(module: nn.Module, ctx: DistContext) -> RunMethod:
    registered: set[str] = set()

    def run(method: str, *args: Any, **kwargs: Any) -> Any:
        if method != "forward" and method not in registered:
            from torch.distributed.fsdp import register_fsdp_forward_method

            register_fsdp_forward_method(module, method)
            registered.add(method)
        try:
            out = call_method(module, method, *args, **kwargs)
        except RuntimeError as error:  # parameters are gathered here
            raise_naming_rank(error, "forward", WORLD, ctx.comm)
        return out if ctx.compute_dtype is None else to_fp32(out)

    return run


def same_optimizer(opt: Optimizer, engine: nn.Module, ctx: DistContext) -> Optimizer:
    """Return `opt`, whose `zero_grad` now also forgets what FSDP has accumulated without sync, and keeps to itself."""
    _forgets(opt, engine)
    return opt


def _forgets(owner: nn.Module | Optimizer, engine: nn.Module) -> None:
    plain = owner.zero_grad

    def zero_grad(set_to_none: bool = True) -> None:  # noqa: FBT001, FBT002 (torch's own signature)
        plain(set_to_none)
        forget(engine)

    owner.zero_grad = zero_grad  # type: ignore[method-assign]


def forget(engine: nn.Module) -> None:
    """Drop the gradients that micro-batches without sync have left in the units of `engine`."""
    for module in engine.modules():
        state = getattr(module, "_get_fsdp_state", lambda: None)()
        for group in getattr(state, "_fsdp_param_groups", ()):
            for each in group.fsdp_params:
                each.unsharded_accumulated_grad = None
                if getattr(each, "_unsharded_param", None) is not None:
                    each._unsharded_param.grad = None


_SYNC = "_faccel_sync"


@contextmanager
def _grad_sync(engine: Any, *, on: bool) -> Generator[None]:
    before = engine.__dict__.get(_SYNC, True)
    _set_sync(engine, on=on)
    try:
        yield
    finally:
        _set_sync(engine, on=before)


def _set_sync(engine: Any, *, on: bool) -> None:
    engine.__dict__[_SYNC] = on  # torch does not tell
    engine.set_requires_gradient_sync(on)


def sync_buffers(engine: nn.Module, ctx: DistContext) -> None:
    """Give every rank of a stage the buffers of its first one."""
    buffers = dict(engine.named_buffers())
    if buffers:
        broadcast_from_rank_0(buffers, ctx, "stage")


FSDP = Parallelism("sharded", _wrap, same_optimizer, _grad_sync, sync_buffers)
