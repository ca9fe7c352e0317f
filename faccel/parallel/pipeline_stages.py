"""Cutting a model into the stages of a pipeline: pure functions of names and sizes, and the cut itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from faccel.errors import ConfigError, ModelError
from faccel.parallel.units import matching
from faccel.plan import PipelineConfig


def chain_of(module: nn.Module, plan: PipelineConfig) -> list[str]:
    """Return the names of the modules that the input passes, in order.

    Raises:
        ConfigError: A pattern means nothing, or two mean one module.
        ModelError: A parameter belongs to none of them.
    """
    names = [name for name, _ in module.named_modules(remove_duplicate=False) if name]
    chain = [name for pattern in plan.chain for name in matching(pattern, names, "module")]
    for name in chain:
        if chain.count(name) > 1 or any(name.startswith(f"{other}.") for other in chain):
            got = ", ".join(plan.chain)
            raise ConfigError(
                f"two patterns of the chain mean the module `{name}`", got=got, fix="narrow one"
            )
    for name, _ in module.named_parameters(remove_duplicate=False):
        if not any(name.startswith(f"{each}.") for each in chain):
            fix = "name its module in the chain, or put it into one"
            raise ModelError(
                "a parameter belongs to no module of the pipeline's chain", got=f"`{name}`", fix=fix
            )
    for name, each in module.named_modules():
        inside = any(name == one or name.startswith(f"{one}.") for one in chain)
        if (
            name
            and not inside
            and not is_loss(each)
            and next(each.children(), None) is None
            and not _is_list(each)
        ):
            fix = "name it in the chain where the input passes it, or take it out of the model"
            raise ModelError(
                "the pipeline's chain leaves a module out",
                got=f"`{name}`, a {type(each).__name__}",
                fix=fix,
            )
    return chain


def is_loss(module: nn.Module) -> bool:
    """Whether a module is one of torch's losses, which no input passes."""
    return isinstance(module, nn.modules.loss._Loss)  # pyright: ignore[reportPrivateUsage]


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, (nn.ModuleList, nn.ModuleDict))


def stages_of(module: nn.Module, plan: PipelineConfig, count: int) -> list[list[str]]:
    """Return the modules of each of `count` stages, by the plan's `split` or with parameters balanced.

    Raises:
        ConfigError: The split does not give so many stages, or the chain is shorter.
    """
    chain = chain_of(module, plan)
    if len(chain) < count:
        fix = f"use at most {len(chain)} stages, or a longer chain"
        raise ConfigError(
            f"a chain of {len(chain)} modules has no {count} stages", got=", ".join(chain), fix=fix
        )
    if plan.split is None:
        sizes = [sum(p.numel() for p in module.get_submodule(name).parameters()) for name in chain]
        starts = balanced(sizes, count)
    else:
        unknown = [name for name in plan.split if name not in chain[1:]]
        if unknown or len(set(plan.split)) != count - 1:
            fix = f"name {count - 1} modules of the chain at which a stage begins"
            raise ConfigError(
                f"this split does not make {count} stages", got=", ".join(plan.split), fix=fix
            )
        starts = [0, *sorted(chain.index(name) for name in plan.split)]
    return [chain[a:b] for a, b in zip(starts, [*starts[1:], len(chain)], strict=True)]


def balanced(sizes: Sequence[int], count: int) -> list[int]:
    """Return where each of `count` contiguous parts of `sizes` begins, so that the largest is as small as it can be.

    Examples:
        >>> balanced([5, 1, 1, 1, 4], 3), balanced([56, 0, 24, 0, 20, 0, 6], 4)
        ([0, 1, 4], [0, 1, 3, 5])
    """
    total = [0]
    for size in sizes:
        total.append(total[-1] + size)
    best: dict[tuple[int, int], tuple[int, int, list[int]]] = {(0, 0): (0, 0, [])}
    for end in range(1, len(sizes) + 1):
        for parts in range(1, min(count, end) + 1):
            options: list[tuple[int, int, list[int]]] = []
            for start in range(parts - 1, end):
                if (start, parts - 1) in best:
                    largest, squares, starts = best[start, parts - 1]
                    here = total[end] - total[start]
                    options.append((max(largest, here), squares + here**2, [*starts, start]))
            best[end, parts] = min(options)  # of those with the same largest part the most even
    return best[len(sizes), count][2]


class StageModule(nn.Module):
    """One stage: modules of the user's, under their own names, one after the other.

    Args:
        module: The whole model.
        names: Which of its modules, in order.
        is_first: Whether the first module of the model is among them.
    """

    def __init__(self, module: nn.Module, names: Sequence[str], *, is_first: bool) -> None:
        super().__init__()
        self.is_first = is_first
        self._names = tuple(names)
        for name in names:
            *parents, leaf = name.split(".")
            holder: nn.Module = self
            for parent in parents:
                if parent not in dict(holder.named_children()):
                    holder.add_module(parent, nn.Module())
                holder = holder.get_submodule(parent)
            holder.add_module(leaf, module.get_submodule(name))

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """Pass the input through the modules; keyword arguments are for the first of the model."""
        first, *others = self._names
        out = self.get_submodule(first)(*inputs, **(kwargs if self.is_first else {}))
        for name in others:
            out = (
                self.get_submodule(name)(*out)
                if isinstance(out, tuple)
                else self.get_submodule(name)(out)
            )
        return out


class Elsewhere(nn.Module):
    """What stands in the place of a module that another stage has."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse."""
        fix = "call the wrapped model, or `faccel.parallel.pipeline_step`"
        raise ModelError("this part of the model is on another rank of the pipeline", fix=fix)


def remove_other_stages(
    module: nn.Module, stages: Sequence[Sequence[str]], own: Sequence[str]
) -> None:
    """Replace the modules of the stages that are not this rank's. Updates `module`."""
    for name in (name for stage in stages for name in stage if name not in own):
        parent, _, leaf = name.rpartition(".")
        module.get_submodule(parent)._modules[leaf] = Elsewhere()  # pyright: ignore[reportPrivateUsage]


def tied_params(module: nn.Module, stages: Sequence[Sequence[str]]) -> list[dict[int, str]]:
    """Return for each parameter that several stages have its name in each, by the number of the stage."""
    owners: dict[int, dict[int, str]] = {}
    for number, stage in enumerate(stages):
        for each in stage:
            for name, p in module.get_submodule(each).named_parameters(
                prefix=each, remove_duplicate=False
            ):
                owners.setdefault(id(p), {}).setdefault(number, name)
    return [names for names in owners.values() if len(names) > 1]
