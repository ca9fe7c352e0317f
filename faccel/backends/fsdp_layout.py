"""How a plan applies to one model under FSDP2, checked before any parameter is moved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import attrs
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from faccel.context import DistContext
from faccel.errors import ModelError
from faccel.parallel.activation_checkpoint import check_has_units
from faccel.parallel.expert_parallel import check_styles, moes_of
from faccel.parallel.fp8 import Fp8Layers, fp8_layers
from faccel.parallel.moe import MoE
from faccel.parallel.param_hooks import hooks_of
from faccel.parallel.units import matching, units_of
from faccel.plan import Fp8, Plan

T = TypeVar("T")


@attrs.frozen(eq=False)
class Layout:
    """The modules and parameters that the patterns of a plan match in one model.

    Args:
        units: Sharding units by name, inner ones first.
        tp_styles: Tensor-parallel style by module name.
        ignored: Names of parameters that stay replicated.
        fp32_units: Names of units that compute in fp32.
        moes: `MoE` modules by name, whose experts are sharded over the axis `ep`.
        fp8: The linear layers in fp8.
    """

    units: Mapping[str, nn.Module]
    tp_styles: Mapping[str, str]
    ignored: frozenset[str]
    fp32_units: frozenset[str]
    moes: Mapping[str, MoE]
    fp8: Fp8Layers = attrs.field(factory=lambda: Fp8Layers({}, Fp8()))

    @classmethod
    def from_plan(cls, module: nn.Module, plan: Plan, ctx: DistContext) -> Layout:
        """Match the patterns of `plan` against `module`.

        Raises:
            ConfigError: A pattern matches nothing.
            ModelError: A parameter cannot be sharded as planned.
        """
        moes = moes_of(module, ctx.mesh.spec)
        units = _units_without_experts(module, plan, moes)
        check_has_units(units, plan)
        ignored = _ignored_names(module, plan)
        _check_no_scalar(module, ignored)
        fp32_units: set[str] = set()
        for pattern in plan.fsdp.fp32_units:
            fp32_units.update(matching(pattern, units, "unit"))
        tp_styles = _tp_styles(module, plan, ctx)
        check_styles(moes, tp_styles)
        _check_classes(module, ignored)
        _check_hooks(module, {**tp_styles, **_experts(moes)}, ignored)
        return cls(units, tp_styles, ignored, frozenset(fp32_units), moes)

    def with_fp8(self, module: nn.Module, plan: Plan, ctx: DistContext) -> Layout:
        """Return the layout with the linear layers in fp8.

        Raises:
            FaccelError: See `fp8_layers`.
        """
        layers = fp8_layers(module, plan, ctx)
        in_fp32 = [name for name in layers.layers if self.computes_in_fp32(name)]
        return attrs.evolve(self, fp8=layers.without(in_fp32))

    def below(self, names: Sequence[str]) -> Layout:
        """Return the layout of the modules of these names and of the modules inside them."""
        return attrs.evolve(
            self,
            units=_inside(names, self.units),
            tp_styles=_inside(names, self.tp_styles),
            moes=_inside(names, self.moes),
            fp8=self.fp8.only(_inside(names, self.fp8.layers)),
            # A stage of a pipeline does not have the ignored parameters of the other stages.
            ignored=frozenset(_inside(names, dict.fromkeys(self.ignored))),
        )

    def computes_in_fp32(self, name: str) -> bool:
        """Return whether the innermost unit that contains the module `name` computes in fp32."""
        for unit in self.units:  # inner ones come first
            if contains(unit, name):
                return unit in self.fp32_units
        return False


def contains(outer: str, name: str) -> bool:
    """Return whether the module `outer` is the module `name` or contains it.

    Examples:
        >>> contains("blocks.1", "blocks.1.up"), contains("blocks.1", "blocks.10")
        (True, False)
    """
    return name == outer or name.startswith(f"{outer}.")


def _inside(outer_names: Sequence[str], by_name: Mapping[str, T]) -> dict[str, T]:
    """Return the entries whose module is one of the outer modules or inside one."""
    inside: dict[str, T] = {}
    for name, value in by_name.items():
        is_inside = any(contains(outer, name) for outer in outer_names)
        if is_inside:
            inside[name] = value
    return inside


def _units_without_experts(
    module: nn.Module, plan: Plan, moes: Mapping[str, MoE]
) -> dict[str, nn.Module]:
    # Experts are sharded over another mesh, so `shard_experts` makes units of them.
    experts = {id(moe.experts) for moe in moes.values()}
    units = dict(units_of(module, plan))
    for name, unit in list(units.items()):
        if id(unit) in experts:
            del units[name]
    return units


def _ignored_names(module: nn.Module, plan: Plan) -> frozenset[str]:
    """Return the names of the ignored parameters; a tied parameter has several."""
    # By `id`, because a pattern may match one of the names of a tied parameter.
    params = dict(module.named_parameters(remove_duplicate=False))
    ignored: set[int] = set()
    for pattern in plan.fsdp.ignored:
        for name in matching(pattern, params, "parameter"):
            ignored.add(id(params[name]))
    return frozenset(name for name, param in params.items() if id(param) in ignored)


def _check_no_scalar(module: nn.Module, ignored: Iterable[str]) -> None:
    """Refuse 0-d parameters: FSDP2 shards along the first dim."""
    for name, param in module.named_parameters(remove_duplicate=False):
        if param.ndim == 0 and name not in ignored:
            raise ModelError(
                "a scalar parameter cannot be sharded",
                got=f"`{name}`",
                fix="give it the shape [1], or name it in "
                "`fsdp=faccel.parallel.FsdpConfig(ignored=...)`",
            )


def _check_classes(module: nn.Module, ignored: Iterable[str]) -> None:
    """Refuse subclasses of `nn.Parameter`: shards and gathered parameters are plain ones."""
    for name, param in module.named_parameters(remove_duplicate=False):
        # A tensor subclass in a parameter is no subclass of `nn.Parameter`.
        cls = type(param)
        is_subclass = cls is not nn.Parameter and nn.Parameter in cls.__mro__
        if is_subclass and name not in ignored:
            raise ModelError(
                f"sharding would replace `{name}` by an `nn.Parameter`, without its class",
                got=f"`{name}`, a {cls.__name__}",
                fix="make it an `nn.Parameter`, or keep it replicated with "
                f'`plan=faccel.Plan(fsdp=faccel.parallel.FsdpConfig(ignored=("{name}",)))`',
            )


def _experts(moes: Mapping[str, MoE]) -> dict[str, str]:
    names: dict[str, str] = {}
    for name in moes:
        prefix = f"{name}." if name else ""
        names[f"{prefix}experts"] = "experts"
    return names


def _check_hooks(module: nn.Module, split: Mapping[str, str], ignored: Iterable[str]) -> None:
    """Refuse hooks of parameters of which no rank computes a full gradient.

    Args:
        module: The model.
        split: The kind of split of each module that computes with a part of its parameters.
        ignored: Names of parameters that stay replicated.
    """
    for name, hooks in hooks_of(module).items():
        outer = [kind for unit, kind in split.items() if contains(unit, name)]
        if hooks.has_hooks and outer and name not in ignored:
            raise ModelError(
                f"the hook of `{name}` would get a part of the gradient",
                got=f"`{name}`, split as {outer[0]}",
                fix="register it after `faccel.wrap`, on a parameter of `model.parameters()`, for "
                "gradients that are DTensors; or leave the module out of the split",
            )


def _tp_styles(module: nn.Module, plan: Plan, ctx: DistContext) -> Mapping[str, str]:
    if ctx.mesh.spec.tp == 1:
        return {}
    from faccel.parallel.tensor_parallel import styles_of

    return styles_of(module, plan, ctx.mesh.spec.tp)


def engine_mesh(ctx: DistContext) -> DeviceMesh:
    """Return the mesh of FSDP2. `dp_shard` and `cp` are one axis: both shard parameters."""
    spec = ctx.mesh.spec
    return _mesh(ctx, {"storage": spec.dp_shard * spec.cp, "tp": spec.tp})


def expert_mesh(ctx: DistContext) -> DeviceMesh:
    """Return the mesh of experts: `ep`, and `ep_storage` of the ranks with the same experts."""
    spec = ctx.mesh.spec
    # Experts are sharded over `ep` and then stored over `ep_storage`. `ep` is the inner axis, so
    # its ranks are neighbours: their all-to-all runs in every layer. Not sliced from `engine_mesh`,
    # whose axes it divides otherwise: torch deprecates flattened sub-meshes.
    num_ranks = spec.dp_shard * spec.cp * spec.tp
    return _mesh(ctx, {"ep_storage": num_ranks // spec.ep, "ep": spec.ep})


def data_mesh(ctx: DistContext) -> DeviceMesh:
    """Return the axes over which parameters are sharded, and replicated if there are replicas."""
    mesh = engine_mesh(ctx)
    if ctx.mesh.spec.dp_replicate > 1:
        return mesh["dp_replicate", "storage"]
    return mesh["storage"]


def _mesh(ctx: DistContext, inner: Mapping[str, int]) -> DeviceMesh:
    spec = ctx.mesh.spec
    extents: dict[str, int] = {}
    if spec.pp > 1:
        # Outermost, because stages exchange the least data: one activation per micro-batch.
        extents["pp"] = spec.pp
    extents["dp_replicate"] = spec.dp_replicate
    # `tp` is innermost, because tensor parallel communicates in every layer: its ranks share a
    # node.
    extents.update(inner)
    if extents.get("tp") == 1:
        del extents["tp"]
    return ctx.mesh.device_mesh_of(extents)
