"""Depth over ranks: torch's pipeline schedules, over stages that are sharded and cut like any other model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import torch
import torch.distributed as dist
from torch import nn

from faccel.backends.fsdp import same_optimizer, shard_module, sync_buffers
from faccel.backends.fsdp_layout import Layout
from faccel.comm.objects import broadcast_objects
from faccel.comm.tensors import broadcast
from faccel.context import DistContext
from faccel.errors import ConfigError, ModelError
from faccel.parallel.forward import to_fp32
from faccel.parallel.pipeline_stages import StageModule, remove_other_stages, stages_of, tied_params
from faccel.parallel.sync_states import check_same_structure
from faccel.plan import PipelineConfig, Plan
from faccel.protocols import WORLD, Parallelism, RunMethod
from faccel.random.generators import call_seeded
from faccel.random.hashing import mix
from faccel.tree import Tree, full_tensor, local_tensor, map_leaves

Loss = Callable[[Callable[..., Any]], torch.Tensor]


@attrs.frozen(eq=False)
class Shared:
    """A parameter that several stages have: its gradients are added.

    Args:
        name: Its name on this rank.
        group: The ranks that have it.
        copy_of: The name of its first copy, if that is on another rank.
    """

    name: str
    group: dist.ProcessGroup
    copy_of: str | None


class Engine(nn.Module):
    """The stages of this rank.

    Args:
        parts: They, in order, each sharded.
        plan: How the pipeline runs.
        shared: Parameters that other stages have, too.
        ctx: The world.
    """

    def __init__(
        self,
        parts: Sequence[StageModule],
        plan: PipelineConfig,
        shared: Sequence[Shared],
        ctx: DistContext,
    ) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.plan, self.shared, self.ctx = plan, tuple(shared), ctx
        self.place, self.size = ctx.comm.rank("pp"), ctx.comm.size("pp")
        self._shapes: dict[str, list[list[Any]]] = {}
        self.has_run = False  # a whole window

    @property
    def is_last(self) -> bool:
        """Whether this rank has the last stage."""
        return self.place == self.size - 1

    def stages(self, asked: tuple[tuple[Any, ...], dict[str, Any]], *, trains: bool) -> list[Any]:
        """Make torch's stages for micro-batches like `asked`. Collective over the pipeline for new shapes.

        The shapes between stages are found by a forward without gradients, once. torch would run a forward and a
        backward each time, and clear the gradients that are there.
        """
        from faccel.parallel.pipeline_schedules import (
            Stage,
        )  # torch's pipelining takes long to import

        key = str(map_leaves(_key_of, [list(asked[0]), asked[1]]))
        if key not in self._shapes:
            self._shapes[key] = self._find_shapes(asked)
        shapes, count = self._shapes[key], self.size * len(self.parts)
        group = self.ctx.comm.group("pp")
        made: list[Any] = []
        for i, part in enumerate(self.parts):
            number = self.place + self.size * i
            given, gives = (
                tuple(_like(each, trains=trains) for each in shapes[n])
                for n in (number, number + 1)
            )
            stage = Stage(part, number, count, self.ctx.device, given, gives, group=group)
            stage.has_backward = trains
            stage.clear_runtime_states()
            made.append(stage)
        return made

    def _find_shapes(self, asked: tuple[tuple[Any, ...], dict[str, Any]]) -> list[list[Any]]:
        """Return the shape and dtype of each tensor before the first stage, between stages, and after the last."""
        current, kwargs = asked
        found = [[_shape_of(x) for x in current]]
        for number in range(self.size * len(self.parts)):
            told: list[Any] = []
            if number % self.size == self.place:
                part: Any = self.parts[number // self.size]
                modes = {each: each.training for each in part.modules()}
                with torch.no_grad():
                    out = part.eval()(*current, **kwargs)
                for each, mode in modes.items():
                    each.training = mode
                part.reshard()
                told = [_shape_of(x) for x in (out if isinstance(out, tuple) else (out,))]
                told = [
                    each if isinstance(each, tuple) else f"a {type(each).__name__}" for each in told
                ]
            told = broadcast_objects([told], self.ctx, src=number % self.size, axis="pp")[0]
            wrong = next((each for each in told if not isinstance(each, tuple)), None)
            if wrong is not None:
                fix = "let each module of the chain return a tensor, or a tuple of tensors"
                raise ModelError(
                    f"stage {number} of the pipeline returns something else than tensors",
                    got=wrong,
                    fix=fix,
                )
            found.append(told)
            current = tuple(
                torch.zeros(shape, dtype=dtype, device=self.ctx.device) for shape, dtype in told
            )
        return found


def _shape_of(x: Any) -> Any:
    return (tuple(x.shape), x.dtype) if isinstance(x, torch.Tensor) else x


def _key_of(x: Any) -> Any:
    return _shape_of(x) if isinstance(x, torch.Tensor) else None  # other values change no shape


def _like(shape: Any, *, trains: bool) -> torch.Tensor:
    size, dtype = shape
    return torch.empty(
        size, dtype=dtype, device="meta", requires_grad=trains and dtype.is_floating_point
    )


class _AskedError(Exception):
    """What a loss function has called its model with: raised to come back from there."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.asked = args, kwargs


def _inputs(loss: Loss) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return what a loss function gives to its model."""

    def ask(*args: Any, **kwargs: Any) -> Any:
        raise _AskedError(args, kwargs)

    try:
        loss(ask)
    except _AskedError as asked:
        return asked.asked
    raise ModelError(
        "the loss function of a pipeline calls its model, once", fix="write `loss_fn(model, batch)`"
    )


def _wrap(module: nn.Module, plan: Plan, ctx: DistContext) -> tuple[nn.Module, RunMethod]:
    if plan.pipeline is None:
        fix = 'write `plan=faccel.Plan(pipeline=faccel.parallel.PipelineConfig(chain=("embed", "blocks.*", "head")))`'
        raise ConfigError(
            "a pipeline needs a plan that says how the model is cut",
            got=str(ctx.mesh.spec),
            fix=fix,
        )
    check_same_structure(module, ctx, WORLD)
    if any(p.is_meta for p in module.parameters()):
        raise ModelError(
            "a pipeline is cut from a model with values", got="meta", fix="build it on the CPU"
        )
    place, size = ctx.comm.rank("pp"), ctx.comm.size("pp")
    stages = stages_of(module, plan.pipeline, size * plan.pipeline.stages_per_rank)
    layout = Layout.from_plan(module, plan, ctx)
    shared = tied_params(module, stages)
    _check_alike(shared, layout, size)
    _check_units(stages, layout)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.copy_(broadcast(tensor.detach(), ctx, axis=WORLD))
    own = stages[place::size]
    parts = [StageModule(module, names, is_first=names is stages[0]) for names in own]
    remove_other_stages(module, stages, [name for names in own for name in names])
    for part, names in zip(parts, own, strict=True):
        shard_module(part, plan, layout.below(names), ctx)
    engine = Engine(parts, plan.pipeline, _groups(module, shared, ctx), ctx)
    return engine, _runner(engine, ctx)


def _check_alike(shared: Sequence[dict[int, str]], layout: Layout, size: int) -> None:
    """Refuse a parameter that two stages have otherwise, or two stages of one rank: gradients could not be added."""
    for names in shared:
        got = ", ".join(f"`{name}`" for name in names.values())
        if len({layout.tp_styles.get(name.rpartition(".")[0]) for name in names.values()}) > 1:
            fix = "leave both out of `tensor`, or untie them"
            raise ModelError(
                "a parameter that two stages share is cut in one of them only", got=got, fix=fix
            )
        if len({stage % size for stage in names}) < len(names):
            fix = "use a number of ranks or a split that puts them on two ranks, or into one stage"
            raise ModelError("two stages of one rank share a parameter", got=got, fix=fix)


def _check_units(stages: Sequence[Sequence[str]], layout: Layout) -> None:
    """Refuse a unit that no module of the chain contains."""
    chain = [name for stage in stages for name in stage]
    for unit in layout.units:
        if not any(unit == name or unit.startswith(f"{name}.") for name in chain):
            fix = "name units that are modules of the chain, or inside of one"
            raise ConfigError(
                "a unit spans several modules of the pipeline's chain", got=f"`{unit}`", fix=fix
            )


def _groups(module: nn.Module, shared: Sequence[dict[int, str]], ctx: DistContext) -> list[Shared]:
    """Make the group of the ranks that have each tied parameter. Collective."""
    place, size = ctx.comm.rank("pp"), ctx.comm.size("pp")
    column = ctx.mesh.spec.peers(ctx.rank, "pp")
    found: list[Shared] = []
    for names in shared:
        owners = {stage % size: name for stage, name in names.items()}
        if place not in owners:
            continue
        ranks = [column[owner] for owner in sorted(owners)]
        group: Any = dist.new_group(ranks, use_local_synchronization=True, group_desc="shared")
        is_copy = place != min(owners)
        found.append(Shared(owners[place], group, names[min(names)] if is_copy else None))
    return found


def _forward_backward(
    engine: nn.Module, losses: Sequence[Loss], factors: Sequence[Any], ctx: DistContext
) -> torch.Tensor:
    from faccel.parallel.pipeline_schedules import SCHEDULES

    assert isinstance(engine, Engine)
    count = len(losses)
    run = SCHEDULES[_schedule_of(engine, count)]
    seed = _common_seed(ctx)
    asked = [call_seeded(_inputs, loss, mix(seed, i)) for i, loss in enumerate(losses)]
    found: dict[int, torch.Tensor] = {}

    def loss_of(out: Any, number: int) -> torch.Tensor:
        def ask(_: None) -> torch.Tensor:  # what the inputs were drawn with, if they were
            return losses[number](
                lambda *args, **kwargs: to_fp32(out) if ctx.compute_dtype else out
            )

        loss = call_seeded(ask, None, mix(seed, number))
        found[number] = full_tensor(loss.detach())
        return loss * factors[number]

    schedule = run(engine.stages(asked[0], trains=True), count, loss_of)
    args, kwargs = [list(each) for each in zip(*asked, strict=True)]
    before = _set_aside(engine)
    schedule._step_microbatches(args, kwargs, list(range(count)), [])
    _add_shared(engine, before)
    engine.has_run = True
    dtype = torch.float64 if next(engine.parameters()).dtype == torch.float64 else torch.float32
    made = torch.zeros(count, dtype=dtype, device=ctx.device)
    for number, loss in found.items():
        made[number] = loss
    return ctx.comm.broadcast(made, engine.size - 1, "pp")


def _schedule_of(engine: Engine, count: int) -> str:
    """Return the schedule of a window; a shorter one at the end of an epoch is run by GPipe.

    Raises:
        ConfigError: The first window has fewer micro-batches than there are ranks.
    """
    kind = engine.plan.schedule
    if count >= engine.size or kind == "interleaved":
        return kind
    if not engine.has_run:
        fix = f"use `grad_accum={engine.size}` or more, or a smaller `pp`"
        got = f"{count} micro-batches on {engine.size} ranks"
        raise ConfigError(
            "a pipeline needs as many micro-batches as it has ranks", got=got, fix=fix
        )
    return "gpipe"


def _common_seed(ctx: DistContext) -> int:
    """Return a number that is the same on all ranks of a pipeline, whose generators have moved apart."""
    mine = torch.randint(2**62, (), dtype=torch.int64).to(ctx.device)
    return int(ctx.comm.broadcast(mine, 0, "pp").item())


def _set_aside(engine: Engine) -> list[torch.Tensor | None]:
    """Take the gradients of shared parameters away, which earlier windows have added up, and return them."""
    before: list[torch.Tensor | None] = []
    for each in engine.shared:
        p = engine_parameter(engine, each.name)
        before.append(p.grad)
        p.grad = None
    return before


def _add_shared(engine: Engine, before: Sequence[torch.Tensor | None]) -> None:
    """Add the gradients of the other stages, then those that were there."""
    for each, old in zip(engine.shared, before, strict=True):
        p = engine_parameter(engine, each.name)
        if p.grad is not None:
            dist.all_reduce(local_tensor(p.grad), group=each.group)
        if old is not None:
            p.grad = old if p.grad is None else p.grad + old


def engine_parameter(engine: Engine, name: str) -> torch.Tensor:
    """Return a parameter of a stage by the user's name."""
    return next(p for part in engine.parts for n, p in part.named_parameters() if n == name)


def _runner(engine: Engine, ctx: DistContext) -> RunMethod:
    def run(method: str, *args: Any, **kwargs: Any) -> Any:
        if method != "forward":
            raise ModelError(
                "a pipeline runs `forward` only",
                got=f"`{method}`",
                fix="unwrap a model of one process",
            )
        if torch.is_grad_enabled():
            fix = "write `faccel.parallel.pipeline_step(loss_fn, model, window, scaler, ctx)`, or `with torch.no_grad():`"
            raise ModelError(
                "a pipeline trains a whole window at a time",
                got="a call with gradients on",
                fix=fix,
            )
        return infer(engine, args, kwargs, ctx)

    return run


def infer(engine: Engine, args: tuple[Any, ...], kwargs: dict[str, Any], ctx: DistContext) -> Tree:
    """Run forward on a batch of any size, cut into micro-batches of equal size; every rank gets the output.

    Collective. Tensors with as many rows as the first are cut with the batch, others go to every micro-batch whole. The
    last micro-batch is filled with repeats of the last row, which are dropped from the output.
    """
    for module in engine.modules():
        kind = nn.modules.batchnorm._BatchNorm  # pyright: ignore[reportPrivateUsage]
        if isinstance(module, kind) and module.training:
            fix = "call `model.eval()` first"
            what = "in training mode batch norm depends on how a batch is cut"
            raise ModelError(what, got=f"a {type(module).__name__}", fix=fix)
    rows = _rows((args, kwargs))
    count = min(engine.size, rows)
    size = -(-rows // count)
    count = -(-rows // size)

    def part(number: int) -> Any:
        def pick(x: Any) -> Any:
            if not _is_batch(x, rows):
                return x
            index = torch.arange(number * size, (number + 1) * size, device=x.device).clamp(
                max=rows - 1
            )
            return x.index_select(0, index)

        picked = map_leaves(pick, [list(args), kwargs])
        return tuple(picked[0]), picked[1]

    chunks = [part(number) for number in range(count)]
    stages = engine.stages(chunks[0], trains=False)
    from faccel.parallel.pipeline_schedules import SCHEDULES

    schedule = SCHEDULES["interleaved" if len(stages) > 1 else "gpipe"](stages, count, None)
    schedule._step_microbatches([c[0] for c in chunks], [c[1] for c in chunks], None, None)
    outputs = [stage.output_chunks for stage in stages if stage.is_last]
    return _to_all(outputs[0] if outputs else None, rows, engine, ctx)


def _is_batch(x: Any, rows: int) -> bool:
    return isinstance(x, torch.Tensor) and x.ndim > 0 and x.shape[0] == rows


def _rows(tree: Tree) -> int:
    found: list[int] = []
    map_leaves(
        lambda x: found.append(x.shape[0]) if isinstance(x, torch.Tensor) and x.ndim else None,
        _listed(tree),
    )
    if not found or not found[0]:
        fix = "pass a tensor with the batch as its first dimension"
        raise ModelError("a pipeline takes a batch of at least one row", got="none", fix=fix)
    return found[0]


def _listed(tree: Any) -> Any:
    return [list(tree[0]), tree[1]]


def _to_all(chunks: Any, rows: int, engine: Engine, ctx: DistContext) -> Tree:
    """Give every rank of the pipeline the output, which the last one has."""
    columns: list[torch.Tensor] = []
    if chunks is not None:
        pieces = [to_fp32(chunk) if ctx.compute_dtype else chunk for chunk in chunks]
        rows_of = [
            tuple(map(full_tensor, piece if isinstance(piece, tuple) else (piece,)))
            for piece in pieces
        ]
        columns = [torch.cat(column)[:rows] for column in zip(*rows_of, strict=True)]
    last = engine.size - 1
    is_one = chunks is not None and not isinstance(chunks[0], tuple)
    sent: list[Any] = [[_shape_of(x) for x in columns], is_one]
    told, is_one = broadcast_objects(sent, ctx, src=last, axis="pp")
    own = columns or [torch.zeros(shape, dtype=dtype, device=ctx.device) for shape, dtype in told]
    out = broadcast(own, ctx, src=last, axis="pp")
    return out[0] if is_one else tuple(out)


def _grad_sync(engine: nn.Module, *, on: bool) -> Any:
    fix = "write `faccel.parallel.pipeline_step`, which reduces once for a window"
    raise ModelError(
        "a pipeline reduces gradients by itself", got=f"`grad_sync(model, on={on})`", fix=fix
    )


def _tied_copies(engine: nn.Module) -> Mapping[int, str]:
    assert isinstance(engine, Engine)
    copies = [(tied.name, tied.copy_of) for tied in engine.shared if tied.copy_of is not None]
    return {id(engine_parameter(engine, name)): copy_of for name, copy_of in copies}


PIPELINE = Parallelism(
    "pipeline",
    _wrap,
    same_optimizer,
    _grad_sync,
    sync_buffers,
    pipeline_forward_backward=_forward_backward,
    tied_copies=_tied_copies,
)
