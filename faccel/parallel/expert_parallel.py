"""Expert parallel: each rank of the axis `ep` holds a part of the experts of every `MoE` of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from faccel.context import DistContext
from faccel.errors import ConfigError, ModelError
from faccel.mesh import MeshSpec
from faccel.parallel.moe import MoE
from faccel.tree import local_tensor


def moes_of(module: nn.Module, spec: MeshSpec) -> dict[str, MoE]:
    """Return the mixtures of experts of `module` that `ep` spreads over ranks, by name; none without `ep`.

    Raises:
        ConfigError: The model has none, or the mesh has `tp`, too.
        ModelError: The experts of one cannot be shared out evenly.
    """
    if spec.ep == 1:
        return {}
    if spec.tp > 1:
        got = f"ep={spec.ep}, tp={spec.tp}"
        raise ConfigError(
            "this version has no expert parallel with tensor parallel",
            got=got,
            fix="leave `tp` out",
        )
    found = {name: each for name, each in module.named_modules() if isinstance(each, MoE)}
    if not found:
        fix = "build it with `faccel.parallel.MoE` layers, or leave `ep` out"
        raise ConfigError(
            "the mesh has `ep`, and the model no experts", got=f"a {type(module).__name__}", fix=fix
        )
    for name, moe in found.items():
        if moe.num_experts % spec.ep:
            fix = f"use an `ep` that divides {moe.num_experts}, or another `num_experts`"
            got = f"{moe.num_experts} experts of `{name or type(module).__name__}`"
            raise ModelError(f"ep={spec.ep} does not divide the experts", got=got, fix=fix)
    return found


def shard_experts(
    moes: Mapping[str, MoE],
    policy: Callable[[str], Any],
    options: Mapping[str, Any],
    mesh: DeviceMesh,
    ctx: DistContext,
) -> None:
    """Cut the experts over `ep`, share each part over the ranks that hold it, and let tokens travel. Updates `moes`.

    Nothing is communicated, because ranks hold the same values. FSDP averages over the ranks that hold the same
    experts, and `MoE` itself over those of `ep`: together over all ranks whose losses are averaged.

    Args:
        moes: From `moes_of`.
        policy: The precision of a module, by its name.
        options: What else `fully_shard` takes for units; of `mesh`, its own is taken.
        mesh: torch's mesh of the world, with the dims `ep_storage` and `ep`.
        ctx: The world.
    """
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor

    sharing = (
        mesh["dp_replicate", "ep_storage"] if ctx.mesh.spec.dp_replicate > 1 else mesh["ep_storage"]
    )
    size = mesh["ep_storage"].size()
    reshard = options["reshard_after_forward"]
    if reshard not in (
        None,
        True,
        False,
    ):  # a number is one of all ranks, of which there are fewer here
        reshard = True
    inner: dict[str, Any] = {**options, "mesh": sharing, "reshard_after_forward": reshard}
    inner["shard_placement_fn"] = lambda p: Shard(_dim(local_tensor(p).shape, size))
    for name, moe in moes.items():
        for key, p in list(moe.experts.named_parameters()):
            part = distribute_tensor(p.detach(), mesh["ep"], [Shard(0)], src_data_rank=None)
            moe.experts.register_parameter(key, nn.Parameter(part, requires_grad=p.requires_grad))
        fully_shard(
            moe.experts, mp_policy=policy(f"{name}.experts" if name else "experts"), **inner
        )
        moe.connect(ctx)


def _dim(shape: Sequence[int], size: int) -> int:
    """Return along which dim a part of the experts is shared: whole experts where that is even, else their rows."""
    return next((dim for dim in (0, 1) if shape[dim] % size == 0), 0)
