"""Full parameters and the full state dict of a sharded model, on demand."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import NoReturn

import attrs
import torch
from torch import nn

from faccel.checks import shown
from faccel.comm.all_or_error import raise_on_all_ranks
from faccel.comm.objects import gather_objects
from faccel.context import DistContext, require_context
from faccel.effects import COLLECTIVE, effectful, updates
from faccel.errors import ConfigError, DesyncError, FaccelError, ModelError, RankFailedError
from faccel.mesh import WORLD
from faccel.parallel.materialize import copy_shard
from faccel.training.full_tensors import FullTensors
from faccel.training.model import WrappedModel, check_context, check_wrapped
from faccel.training.module_names import with_user_names
from faccel.tree import Tree

_DOING = "modify the gathered parameters"


@effectful(COLLECTIVE)
def full_state_dict(
    model: WrappedModel, ctx: DistContext, *, rank: int | None = 0
) -> dict[str, Tree]:
    """Return the state dict of one process, with full tensors, however the model is sharded.

    Effects: collective. Tensors are gathered one by one, so that the other ranks need memory for
    one full tensor only.

    Args:
        model: From `wrap`.
        ctx: The context that `model` was wrapped with.
        rank: The rank that gets the result; None is every rank.

    Returns:
        On `rank` the parameters, buffers and extra states under the names of the user's module, as
        copies on the CPU. Tied parameters are one tensor. On the other ranks an empty dict.

    Raises:
        ConfigError: `rank` is no rank of the world.
        ModelError: `model` is not wrapped, or was wrapped with another context.

    Examples:
        >>> from faccel.testing import simulate
        >>> from faccel.training.model import wrap
        >>> def sizes(ctx):
        ...     model = wrap(nn.Linear(4, 2), ctx)
        ...     return {name: list(x.shape) for name, x in full_state_dict(model, ctx).items()}
        >>> simulate(sizes, 2, mesh="dp_shard=2")
        ({'weight': [2, 4], 'bias': [2]}, {})
    """
    require_context(ctx, "faccel.parallel.full_state_dict(model, ctx)")
    check_wrapped(model)
    check_context(model, ctx)
    _check_rank("rank", rank, ctx)
    ctx.comm.begin_call("full_state_dict")
    tensors, extra = _split(with_user_names(model.state_dict()))
    full_tensors = FullTensors(tensors, ctx)
    first_names = _first_names(model, ctx)
    is_receiver = rank in (None, ctx.rank)
    state: dict[str, Tree] = {}
    for name in full_tensors.specs:
        if name not in first_names:
            full = full_tensors.full(name)
            if is_receiver:  # the other ranks drop it at once
                # A copy also on the CPU, where the tensor of a replica is the model's.
                state[name] = full.to("cpu", copy=True)
    if ctx.mesh.spec.pp > 1:  # every stage has extra states of its modules
        for stage in gather_objects(extra, ctx, axis="pp"):
            extra |= stage
    if not is_receiver:
        return {}
    # In the order of the module, with all names of tied tensors.
    ordered = {name: state[first_names.get(name, name)] for name in full_tensors.specs}
    return ordered | extra


def _split(state: Mapping[str, Tree]) -> tuple[dict[str, torch.Tensor], dict[str, Tree]]:
    """Return the tensors of a state dict, and its extra states."""
    tensors: dict[str, torch.Tensor] = {}
    extra: dict[str, Tree] = {}
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            tensors[name] = value.detach()
        else:
            extra[name] = value
    return tensors, extra


def _check_rank(name: str, rank: int | None, ctx: DistContext) -> None:
    is_int = isinstance(rank, int) and not isinstance(rank, bool)
    if rank is None or (is_int and 0 <= rank < ctx.world_size):
        return
    raise ConfigError(
        f"`{name}` must be a rank below {ctx.world_size}, or None",
        got=shown(rank),
        fix=f"write `{name}=0`",
    )


def _first_names(model: WrappedModel, ctx: DistContext) -> dict[str, str]:
    """Return the first name of each tied parameter by its other names. Collective in a pipeline."""
    names_by_param: dict[int, str] = {}
    tied_copies = model.parallelism.tied_copies(model.engine)
    first_names: dict[str, str] = {}
    named_params = model.module.named_parameters(remove_duplicate=False)
    for name, param in with_user_names(dict(named_params)).items():
        # The first copy may be in a stage of another rank.
        first = names_by_param.setdefault(id(param), tied_copies.get(id(param), name))
        if first != name:
            first_names[name] = first
    if ctx.mesh.spec.pp > 1:
        for stage in gather_objects(first_names, ctx, axis="pp"):
            first_names |= stage
    return first_names


@effectful(updates("model"), COLLECTIVE)
def gathered(
    model: WrappedModel, ctx: DistContext, *, modifier_rank: int | None = None
) -> AbstractContextManager[Mapping[str, torch.Tensor]]:
    """Return a context in which the parameters of the model are full, plain tensors.

    Effects: updates model, collective. Needs memory for the full model on every rank.

    Inside, the parameters of `model` and of the user's module are full on every rank: read their
    norms, or initialise them. The context yields all of them by name, in a pipeline also those of
    other stages. A call of the model inside raises. At the end, also after an exception, the
    modules have their own parameters again, the ones that the optimizer has.

    Args:
        model: From `wrap`.
        ctx: The context that `model` was wrapped with.
        modifier_rank: None only reads. Otherwise the values that this rank has at the end are
            written into the parameters of all ranks, as by DeepSpeed's `GatheredParameters`. After
            an exception nothing is written.

    Raises:
        ConfigError: `modifier_rank` is no rank of the world.
        ModelError: `model` is not wrapped, or was wrapped with another context. Or a parameter was
            changed inside without `modifier_rank`; at the end of the block. Or `model` was called
            inside.
        RankFailedError: Another rank raised inside, with `modifier_rank`.

    Examples:
        >>> from faccel.testing import simulate
        >>> from faccel.training.model import wrap
        >>> def reset(ctx):
        ...     model = wrap(nn.Linear(4, 2), ctx)
        ...     with gathered(model, ctx, modifier_rank=0) as params:
        ...         _ = nn.init.ones_(model.module.weight)
        ...     return list(params["weight"].shape), model.module.weight.full_tensor().sum().item()
        >>> simulate(reset, 2, mesh="dp_shard=2")[0]
        ([2, 4], 8.0)
    """
    require_context(ctx, "faccel.parallel.gathered(model, ctx)")
    check_wrapped(model)
    check_context(model, ctx)
    _check_rank("modifier_rank", modifier_rank, ctx)
    ctx.comm.begin_call("gathered")
    return _gathered(model, ctx, modifier_rank)


@contextmanager
def _gathered(
    model: WrappedModel, ctx: DistContext, modifier_rank: int | None
) -> Generator[Mapping[str, torch.Tensor]]:
    full_params = _FullParams.of(model, ctx, is_copied=modifier_rank is not None)
    # First of all hooks: FSDP2's would compute with the shards, or take a full tensor for one.
    handle = model.module.register_forward_pre_hook(_raise_in_forward, prepend=True)
    full_params.register()
    try:
        yield full_params.by_name
    except Exception as error:
        # Those two are raised on every rank. The others wait in the call below.
        if modifier_rank is not None and not isinstance(error, DesyncError | RankFailedError):
            with suppress(FaccelError):
                raise_on_all_ranks(error, ctx, _DOING)
        raise
    finally:
        full_params.restore()
        handle.remove()
    if modifier_rank is None:
        full_params.check_unchanged()
    else:
        raise_on_all_ranks(None, ctx, _DOING)
        full_params.write(modifier_rank)


def _raise_in_forward(module: nn.Module, args: Tree) -> NoReturn:
    raise ModelError(
        "`model` was called inside of `faccel.parallel.gathered`",
        got=f"a forward of a {type(module).__name__}",
        fix="call it after the `with` block",
    )


@attrs.frozen(eq=False)
class _FullParams:
    """The full parameters of a model, and the parameters that they replace.

    Args:
        model: The model.
        ctx: Its context.
        by_name: Full parameters of all stages by the user's names, tied ones under each name.
        module_params: The parameters of this rank's modules, by the names in the module.
        sources: The tensors of the engine that hold the values, by the user's names.
        first_names: As from `_first_names`.
        versions: Of the full parameters, by name; a write changes them.
    """

    model: WrappedModel
    ctx: DistContext
    by_name: Mapping[str, nn.Parameter]
    module_params: Mapping[str, nn.Parameter]
    sources: Mapping[str, torch.Tensor]
    first_names: Mapping[str, str]
    versions: Mapping[str, int]

    @classmethod
    def of(cls, model: WrappedModel, ctx: DistContext, *, is_copied: bool) -> _FullParams:
        """Gather the parameters. Collective.

        Args:
            model: The model.
            ctx: Its context.
            is_copied: Whether to copy those that are full already, because they will be changed.
        """
        module_params = dict(model.module.named_parameters(remove_duplicate=False))
        user_params = _by_name_in_state(model, module_params)
        first_names = _first_names(model, ctx)
        state_io = model.parallelism.state
        shards: Mapping[str, Tree] = {}
        if state_io is not None:
            shards = state_io.export(model.engine)
        sources = {name: shards.get(name, param) for name, param in user_params.items()}
        full_tensors = FullTensors(sources, ctx)
        by_name: dict[str, nn.Parameter] = {}
        with torch.no_grad():
            for name in full_tensors.specs:
                if name not in first_names:
                    full = full_tensors.full(name)
                    by_name[name] = _parameter(full, user_params.get(name), is_copied=is_copied)
        for name, first_name in first_names.items():
            by_name[name] = by_name[first_name]
        versions = {name: param._version for name, param in by_name.items()}
        return cls(model, ctx, by_name, module_params, sources, first_names, versions)

    def register(self) -> None:
        """Give the full parameters to the modules. Updates the modules."""
        for name, user_name in zip(self.module_params, self.sources, strict=True):
            self._set(name, self.by_name[user_name])

    def restore(self) -> None:
        """Give the modules their own parameters again. Updates the modules."""
        for name, param in self.module_params.items():
            self._set(name, param)

    def _set(self, name: str, param: nn.Parameter) -> None:
        parent, _, leaf = name.rpartition(".")
        # Not `setattr`, which calls a `__setattr__` that the user's module may define.
        container = self.model.module.get_submodule(parent)
        container._parameters[leaf] = param  # pyright: ignore[reportPrivateUsage]

    def check_unchanged(self) -> None:
        """Raise if a full parameter was written.

        Raises:
            ModelError: Names it.
        """
        for name, version in self.versions.items():
            if self.by_name[name]._version != version:
                raise ModelError(
                    f"`{name}` was changed inside of `gathered`, which only reads",
                    got="modifier_rank=None",
                    fix="write `faccel.parallel.gathered(model, ctx, modifier_rank=0)`",
                )

    def write(self, modifier_rank: int) -> None:
        """Write the values of a rank into the parameters of all ranks. Collective."""
        state_io = self.model.parallelism.state
        values: dict[str, torch.Tensor] = {}
        with torch.no_grad():
            for name, param in self.by_name.items():
                if name in self.first_names:
                    continue
                full = param.detach().to(self.ctx.device)
                values[name] = self.ctx.comm.broadcast(full.contiguous(), modifier_rank, WORLD)
                if state_io is None:
                    self._write_shards(name, values.pop(name))
        if state_io is not None:
            # The engine casts its master weights into the parameters that it computes with.
            for name, first_name in self.first_names.items():
                values[name] = values[first_name]
            state_io.restore(self.model.engine, values)

    def _write_shards(self, name: str, value: torch.Tensor) -> None:
        for source_name, source in self.sources.items():
            if self.first_names.get(source_name, source_name) == name:
                copy_shard(source, value)


def _by_name_in_state(
    model: WrappedModel, module_params: Mapping[str, nn.Parameter]
) -> dict[str, nn.Parameter]:
    """Return the parameters of the user's module by their names in the state of the model."""
    state_io = model.parallelism.state
    if state_io is None or state_io.named_parameters is None:
        return with_user_names(module_params)
    # Megatron-core counts the layers of each stage from 0, and the state those of the full model.
    names = {id(param): name for name, param in model.named_parameters()}
    return {names[id(param)]: param for param in module_params.values()}


def _parameter(full: torch.Tensor, param: nn.Parameter | None, *, is_copied: bool) -> nn.Parameter:
    """Return a full tensor as a parameter; `param` itself if that is full, or a copy of it."""
    if param is None:  # a parameter of another stage
        return nn.Parameter(full, requires_grad=full.is_floating_point())
    if full is not param:
        return nn.Parameter(full.detach(), requires_grad=param.requires_grad)
    if is_copied:
        return nn.Parameter(full.clone(), requires_grad=param.requires_grad)
    return param
