"""Expert parallel: each rank of the axis `ep` has a shard of the experts of every `MoE`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from faccel.context import DistContext
from faccel.errors import ConfigError, ModelError, short_repr
from faccel.mesh import MeshSpec
from faccel.parallel.moe import MoE
from faccel.tree import local_tensor

if TYPE_CHECKING:
    from torch.distributed.fsdp import MixedPrecisionPolicy


def moes_of(module: nn.Module, spec: MeshSpec) -> dict[str, MoE]:
    """Return the `MoE` layers of `module` by name; none on a mesh without `ep`.

    Raises:
        ConfigError: The model has no `MoE`.
        ModelError: `ep` does not divide the number of experts of a layer.
    """
    # Without `ep` a `MoE` is a module like any other.
    if spec.ep == 1:
        return {}
    moes = {name: layer for name, layer in module.named_modules() if isinstance(layer, MoE)}
    if not moes:
        raise ConfigError(
            "the mesh has `ep`, and the model no experts",
            got=f"a {type(module).__name__}",
            fix="build it with `faccel.parallel.MoE` layers, or leave `ep` out",
        )
    for name, moe in moes.items():
        if moe.num_experts % spec.ep:
            raise ModelError(
                f"ep={spec.ep} does not divide the experts",
                got=f"{moe.num_experts} experts of `{name or type(module).__name__}`",
                fix=f"use an `ep` that divides {moe.num_experts}, or another `num_experts`",
            )
    return moes


def check_styles(moes: Mapping[str, MoE], tp_styles: Mapping[str, str]) -> None:
    """Refuse styles of tensor parallel with which ranks of `tp` would have other tokens.

    Raises:
        ConfigError: A style shards the sequence, or a module inside a `MoE`.
    """
    for name, style in tp_styles.items():
        # The input of a `MoE` is then a chunk of the sequence, perhaps without a trace of that.
        if moes and style.startswith("sequence"):
            raise ConfigError(
                "sequence parallel with expert parallel is unsupported",
                got=f"`{name}` in the style {short_repr(style)}, and `{next(iter(moes))}`",
                fix='write "colwise", "rowwise" and "replicate" in `tensor`',
            )
        for moe_name in moes:
            is_inside = not moe_name or name.startswith(f"{moe_name}.")
            if is_inside and style != "replicate":
                raise ConfigError(
                    "a module of a layer of experts cannot be sharded over `tp`",
                    got=f"`{name}` in the style {short_repr(style)}",
                    fix="leave it out of `tensor`; the experts are sharded over `ep`",
                )


def shard_experts(
    moes: Mapping[str, MoE],
    policy: Callable[[str], MixedPrecisionPolicy],
    options: Mapping[str, Any],
    mesh: DeviceMesh,
    ctx: DistContext,
) -> None:
    """Shard the experts over `ep`, and FSDP-shard each result over `ep_storage`. Updates `moes`.

    Nothing is communicated, because ranks have the same values. FSDP averages gradients over the
    ranks with the same experts, and `MoE` over the ranks of `ep`: together over all ranks whose
    losses are averaged. The ranks of `tp` are among those of `ep` and `ep_storage`.

    Args:
        moes: From `moes_of`.
        policy: Returns the precision of a module by its name.
        options: The other arguments of `fully_shard` for units; their `mesh` is replaced.
        mesh: torch's mesh of the world, with the dims `ep_storage` and `ep`.
        ctx: The context.
    """
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor

    # The ranks that have the same experts: those of one coordinate on `ep`.
    storage_mesh = mesh["ep_storage"]
    num_ranks = storage_mesh.size()
    if ctx.mesh.spec.dp_replicate > 1:
        storage_mesh = mesh["dp_replicate", "ep_storage"]
    expert_options: dict[str, Any] = {**options, "mesh": storage_mesh}
    if not isinstance(options["reshard_after_forward"], bool | None):
        # A number of ranks of the full mesh; the experts' mesh has fewer.
        expert_options["reshard_after_forward"] = True
    # FSDP2 pads dim 0 if it is not a multiple of the ranks; rows of the experts avoid that.
    expert_options["shard_placement_fn"] = lambda param: Shard(
        _shard_dim(local_tensor(param).shape, num_ranks)
    )
    for name, moe in moes.items():
        for param_name, param in list(moe.experts.named_parameters()):
            # Before `fully_shard`, which then composes the two shardings into one DTensor.
            sharded = distribute_tensor(param.detach(), mesh["ep"], [Shard(0)], src_data_rank=None)
            sharded_param = nn.Parameter(sharded, requires_grad=param.requires_grad)
            moe.experts.register_parameter(param_name, sharded_param)
        experts_name = f"{name}.experts" if name else "experts"
        fully_shard(moe.experts, mp_policy=policy(experts_name), **expert_options)
        moe.connect(ctx)


def _shard_dim(shape: Sequence[int], num_ranks: int) -> int:
    """Return the dim to shard experts on: full experts if that is even, else their rows."""
    for dim in (0, 1):
        if shape[dim] % num_ranks == 0:
            return dim
    return 0
