"""The stages of a pipeline: the split of a model into them, balanced by parameters."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NoReturn

import attrs
from torch import nn

from faccel.context import DistContext
from faccel.errors import ConfigError, ModelError
from faccel.parallel.forward import forward_precision
from faccel.parallel.pipeline_forward import OutputStructure, StageForward
from faccel.parallel.units import matching
from faccel.plan import V_SCHEDULES, PipelineConfig, Plan
from faccel.training.true_precision import cast_inputs
from faccel.tree import Tree


@attrs.frozen
class StageRanks:
    """Which rank of a pipeline has which stages.

    Args:
        num_ranks: Number of ranks of the pipeline.
        stages_per_rank: Number of stages of each rank.
        is_v: Whether the stages go to the last rank and back: stage `i` of `2 * R` is on rank
            `min(i, 2 * R - 1 - i)`. Else it is on rank `i % R`.

    Examples:
        >>> loop, v = StageRanks(2, 2, is_v=False), StageRanks(2, 2, is_v=True)
        >>> loop.stages_of(0), v.stages_of(0), loop.last_rank, v.last_rank
        ([0, 2], [0, 3], 1, 0)
    """

    num_ranks: int
    stages_per_rank: int
    is_v: bool = attrs.field(kw_only=True)

    @classmethod
    def of(cls, config: PipelineConfig, num_ranks: int) -> StageRanks:
        """Return the assignment that a schedule needs."""
        is_v = config.schedule in V_SCHEDULES
        return cls(num_ranks, config.stages_per_rank, is_v=is_v)

    @property
    def num_stages(self) -> int:
        """Number of stages of the whole pipeline."""
        return self.num_ranks * self.stages_per_rank

    @property
    def last_rank(self) -> int:
        """The rank of the last stage, which computes the losses."""
        return self.rank_of(self.num_stages - 1)

    def rank_of(self, stage: int) -> int:
        """Return the rank that has a stage."""
        if self.is_v:
            return min(stage, self.num_stages - 1 - stage)
        return stage % self.num_ranks

    def stages_of(self, rank: int) -> list[int]:
        """Return the stages of a rank, in order."""
        return [stage for stage in range(self.num_stages) if self.rank_of(stage) == rank]


def chain_of(module: nn.Module, plan: PipelineConfig) -> list[str]:
    """Return the names of the modules that the input passes through, in order.

    Raises:
        ConfigError: A pattern matches nothing, or two patterns match one module.
        ModelError: A parameter or a module of the model is not in the chain.
    """
    names = [name for name, _ in module.named_modules(remove_duplicate=False) if name]
    # In the order of the patterns: the order in which the modules run.
    chain: list[str] = []
    for pattern in plan.chain:
        chain += matching(pattern, names, "module")
    for name in chain:
        if chain.count(name) > 1 or _is_below(name, chain):
            raise ConfigError(
                f"two patterns of `chain` match the module `{name}`",
                got=", ".join(plan.chain),
                fix="write patterns that match each module once",
            )
    for name, _ in module.named_parameters(remove_duplicate=False):
        if not _is_below(name, chain):
            raise ModelError(
                "a parameter is in no module of the pipeline's `chain`",
                got=f"`{name}`",
                fix="name its module in the chain, or move it into one of its modules",
            )
    if plan.forward == "chain":
        _check_complete(module, chain)
    return chain


def _is_below(name: str, modules: Collection[str]) -> bool:
    return any(name.startswith(f"{other}.") for other in modules)


def _check_complete(module: nn.Module, chain: Sequence[str]) -> None:
    """Raise if a module without parameters, such as an activation, is not in the chain."""
    for name, submodule in module.named_modules():
        # A leaf outside of the chain would never run. Losses are called by the loss function.
        is_leaf = next(submodule.children(), None) is None
        is_container = isinstance(submodule, (nn.ModuleList, nn.ModuleDict))
        if not name or not is_leaf or is_container or is_loss(submodule):
            continue
        if name not in chain and not _is_below(name, chain):
            raise ModelError(
                "a module is missing in the pipeline's `chain`",
                got=f"`{name}`, a {type(submodule).__name__}",
                fix="name it at its position in the chain, or remove it from the model",
            )


def is_loss(module: nn.Module) -> bool:
    """Whether a module is one of PyTorch's losses, which are not part of the chain."""
    return isinstance(module, nn.modules.loss._Loss)  # pyright: ignore[reportPrivateUsage]


def stages_of(module: nn.Module, plan: PipelineConfig, num_stages: int) -> list[list[str]]:
    """Return the names of the modules of each stage, by the plan's `split` or balanced by size.

    Raises:
        ConfigError: The split does not make `num_stages` stages, or the chain is shorter.
        ModelError: As in `chain_of`.
    """
    chain = chain_of(module, plan)
    if len(chain) < num_stages:
        raise ConfigError(
            f"a chain of {len(chain)} modules is too short for {num_stages} stages",
            got=", ".join(chain),
            fix=f"use at most {len(chain)} stages, or a longer chain",
        )
    if plan.split is None:
        starts = _balanced_starts(module, plan, chain, num_stages)
    else:
        starts = _split_starts(chain, plan.split, num_stages)
    ends = [*starts[1:], len(chain)]
    return [chain[start:end] for start, end in zip(starts, ends, strict=True)]


def _balanced_starts(
    module: nn.Module, plan: PipelineConfig, chain: Sequence[str], num_stages: int
) -> list[int]:
    sizes = [_numel(module, name) for name in chain]
    num_before = 0
    if plan.forward == "model":
        num_before = _num_before_blocks(plan, chain)
    # What embeddings return together is the input of the first block only.
    sizes[: num_before + 1] = [sum(sizes[: num_before + 1])]
    if len(sizes) < num_stages:
        raise ConfigError(
            f"a chain of {len(sizes)} blocks and later modules is too short for {num_stages} "
            "stages",
            got=", ".join(chain),
            fix=f"use at most {len(sizes)} stages, or a longer chain",
        )
    first, *others = balanced(sizes, num_stages)
    return [first, *(start + num_before for start in others)]


def _num_before_blocks(plan: PipelineConfig, chain: Sequence[str]) -> int:
    """Return the number of modules before those of the first pattern with `*`."""
    for pattern in plan.chain:
        if "*" in pattern:
            return chain.index(matching(pattern, chain, "module")[0])
    return 0


def _numel(module: nn.Module, name: str) -> int:
    return sum(param.numel() for param in module.get_submodule(name).parameters())


def _split_starts(chain: Sequence[str], split: Sequence[str], num_stages: int) -> list[int]:
    # The first module begins stage 0, so it is no split point.
    unknown = set(split).difference(chain[1:])
    if unknown or len(set(split)) != num_stages - 1:
        raise ConfigError(
            f"`split` does not make {num_stages} stages",
            got=", ".join(split),
            fix=f"name {num_stages - 1} modules of the chain, the first ones of stages 1 to "
            f"{num_stages - 1}",
        )
    return [0, *sorted(chain.index(name) for name in split)]


@attrs.frozen(order=True)
class _Split:
    """A split of a prefix of the chain; the smaller one is better."""

    largest: int
    sum_of_squares: int
    starts: tuple[int, ...]


def balanced(sizes: Sequence[int], num_stages: int) -> list[int]:
    """Return the start of each of `num_stages` contiguous ranges of `sizes`.

    The largest range is as small as possible. Of those splits, the one with the smallest sum of
    squares is returned. Dynamic programming over prefixes (the linear partition problem).

    Examples:
        >>> balanced([5, 1, 1, 1, 4], 3), balanced([56, 0, 24, 0, 20, 0, 6], 4)
        ([0, 1, 4], [0, 1, 3, 5])
    """
    # prefix_sums[i] is the size of sizes[:i], so that each range costs one subtraction.
    prefix_sums = [0]
    for size in sizes:
        prefix_sums.append(prefix_sums[-1] + size)
    # best[end, n] is the best split of sizes[:end] into n ranges
    # Splits compare by their fields in order: largest range, evenness, earliest starts.
    best = {(0, 0): _Split(0, 0, ())}
    for end in range(1, len(sizes) + 1):
        for num_ranges in range(1, min(num_stages, end) + 1):
            candidates: list[_Split] = []
            for start in range(num_ranges - 1, end):
                previous = best.get((start, num_ranges - 1))
                if previous is None:
                    continue
                size = prefix_sums[end] - prefix_sums[start]
                largest = max(previous.largest, size)
                squares = previous.sum_of_squares + size**2
                candidates.append(_Split(largest, squares, (*previous.starts, start)))
            best[end, num_ranges] = min(candidates)
    return list(best[len(sizes), num_stages].starts)


class StageModule(nn.Module):
    """The modules of one stage under their names in the model, run one after the other.

    Args:
        module: The full model.
        names: The names of the stage's modules, in order.
        plan: How the model runs.
        ctx: The context.
        is_first: Whether the stage is the first one of the pipeline.
        stage_forward: Runs the forward of the model; None where the stage calls its modules one
            after the other.

    Attributes:
        micro_batch: The inputs of the model, for `stage_forward`.
        structure: The structure of the last output of the last stage, with `stage_forward`.
    """

    def __init__(
        self,
        module: nn.Module,
        names: Sequence[str],
        plan: Plan,
        ctx: DistContext,
        *,
        is_first: bool,
        stage_forward: StageForward | None = None,
    ) -> None:
        super().__init__()
        self.is_first = is_first
        # No child, because the stage has its modules under their names.
        self.stage_forward = stage_forward
        self.micro_batch: tuple[tuple[Tree, ...], Mapping[str, Tree]] = ((), {})
        self.structure: OutputStructure | None = None
        self.plan = plan
        self.ctx = ctx
        # A parent may hold modules of several stages; here it has this stage's only.
        self._names = tuple(names)
        for name in names:
            # Empty modules stand for the parents, so that parameters keep the user's names.
            *parents, leaf = name.split(".")
            container: nn.Module = self
            for parent in parents:
                if parent not in dict(container.named_children()):
                    container.add_module(parent, nn.Module())
                container = container.get_submodule(parent)
            container.add_module(leaf, module.get_submodule(name))

    @property
    def first_name(self) -> str:
        """The name of the first module."""
        return self._names[0]

    def forward(self, *inputs: Tree, **kwargs: Tree) -> Tree:
        """Run the modules. Keyword arguments are for the first module of the model."""
        # Here and not around the schedule, which also computes the loss: that is in fp32.
        if self.ctx.param_dtype is not None:
            inputs, kwargs = cast_inputs(inputs, kwargs, self.ctx.param_dtype)
        with forward_precision(self.plan, self.ctx):
            if self.stage_forward is not None:
                return self._run_model(self.stage_forward, inputs)
            return self._run_chain(inputs, kwargs)

    def _run_model(self, stage_forward: StageForward, received: tuple[Tree, ...]) -> Tree:
        args, kwargs = self.micro_batch
        if self.ctx.param_dtype is not None:
            args, kwargs = cast_inputs(args, kwargs, self.ctx.param_dtype)
        output = stage_forward.run(received, args, kwargs)
        if not stage_forward.is_last:
            return output
        # PyTorch's stages return tensors only.
        self.structure, tensors = OutputStructure.split(output)
        return tensors

    def _run_chain(self, inputs: tuple[Tree, ...], kwargs: Mapping[str, Tree]) -> Tree:
        first, *others = self._names
        if self.is_first:
            out = self.get_submodule(first)(*inputs, **kwargs)
        else:
            out = self.get_submodule(first)(*inputs)
        for name in others:
            # A tuple is several arguments, as between the stages of torch's pipeline.
            args = out if isinstance(out, tuple) else (out,)
            out = self.get_submodule(name)(*args)
        return out


class RemoteModule(nn.Module):
    """Replaces a module that is on another rank of the pipeline."""

    def forward(self, *args: Tree, **kwargs: Tree) -> NoReturn:
        """Raise: the module has no parameters on this rank."""
        raise ModelError(
            "this module is on another rank of the pipeline",
            got="a call of a module of another stage",
            fix="call the wrapped model, or `faccel.forward_backward`",
        )


def remove_other_stages(
    module: nn.Module, stages: Sequence[Sequence[str]], own_names: Collection[str]
) -> None:
    """Replace the modules of the other ranks' stages by a `RemoteModule`. Updates `module`."""
    for stage in stages:
        for name in stage:
            if name not in own_names:
                parent, _, leaf = name.rpartition(".")
                container = module.get_submodule(parent)
                container._modules[leaf] = RemoteModule()  # pyright: ignore[reportPrivateUsage]


def tied_params(module: nn.Module, stages: Sequence[Sequence[str]]) -> list[dict[int, list[str]]]:
    """Return, for each parameter in several stages, its names in each by the stage's index."""
    # names_by_param[id(param)][stage index] are its names in that stage.
    names_by_param: dict[int, dict[int, list[str]]] = {}
    for index, stage in enumerate(stages):
        for module_name in stage:
            params = module.get_submodule(module_name).named_parameters(
                prefix=module_name, remove_duplicate=False
            )
            for name, param in params:
                names_by_param.setdefault(id(param), {}).setdefault(index, []).append(name)
    return [names for names in names_by_param.values() if len(names) > 1]
