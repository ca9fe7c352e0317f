"""The forward of a model in one stage of a pipeline, with the modules of other stages left out.

A decoder computes masks, positions and rotary tables from the inputs of the model, and passes them
to each block. They are no activations: each stage computes them again from the inputs, which every
rank of the pipeline has. So a stage runs the `forward` of the model. Between two stages only the
first argument of the module is sent at which the later stage begins.

- Before it, modules of earlier stages return NaN. A forward that uses these values in another way
  than through that argument gets NaN, which the first forward detects.
- At the first module of the next stage, forward ends.

The containers of the model are copied for each stage, so that the user's modules stay as they are.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import attrs
import torch
from torch import nn

from faccel.errors import ModelError
from faccel.tree import Tree, map_leaves

# Attributes of a block that a model may read, such as its kind of attention or its index.
_PLAIN = (bool, int, float, str, type(None))


class _StageEnd(BaseException):
    """Carries what the next stage begins with. No `Exception`, which the model might catch."""

    def __init__(self, name: str, hidden: Tree) -> None:
        super().__init__()
        self.name = name
        self.hidden = hidden


@attrs.define(eq=False)
class _Call:
    """One call of the forward of a stage.

    Args:
        received: What the stage before has sent; None in the first stage.
        poison: What modules of earlier stages return.
        has_begun: Whether the first module of the stage was called.
    """

    received: torch.Tensor | None = None
    poison: torch.Tensor | None = None
    has_begun: bool = False


class _Part(nn.Module):
    """In place of a module: it has the plain attributes of the module."""

    def __init__(self, attributes: Mapping[str, Any]) -> None:
        super().__init__()
        self._attributes = attributes

    def __getattr__(self, name: str) -> Any:
        attributes = self.__dict__.get("_attributes", {})
        if name in attributes:
            return attributes[name]
        return super().__getattr__(name)


class _Earlier(_Part):
    """In place of a module of an earlier stage."""

    def __init__(self, attributes: Mapping[str, Any], call: _Call) -> None:
        super().__init__(attributes)
        self._call = call

    def forward(self, *args: Tree, **kwargs: Tree) -> torch.Tensor:
        assert self._call.poison is not None
        return self._call.poison


class _Later(_Part):
    """In place of a module of a later stage."""

    def __init__(self, attributes: Mapping[str, Any], name: str, parameter: str) -> None:
        super().__init__(attributes)
        self._name = name
        self._parameter = parameter

    def forward(self, *args: Tree, **kwargs: Tree) -> Tree:
        # Models pass it by position or by name.
        hidden = kwargs.get(self._parameter)
        if args:
            hidden = args[0]
        raise _StageEnd(self._name, hidden)


class _First(nn.Module):
    """Around the first module of a stage: it takes what the stage before has sent."""

    def __init__(self, module: nn.Module, parameter: str, call: _Call) -> None:
        super().__init__()
        self.module = module
        self._parameter = parameter
        self._call = call

    def forward(self, *args: Tree, **kwargs: Tree) -> Tree:
        self._call.has_begun = True
        if args:
            return self.module(self._call.received, *args[1:], **kwargs)
        return self.module(**{**kwargs, self._parameter: self._call.received})

    def __getattr__(self, name: str) -> Any:
        # First the module and the hooks of this one.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


class StageForward:
    """Runs the forward of a model with the modules of one stage.

    Args:
        module: The full model.
        stages: The names of the modules of each stage.
        index: The stage.

    Attributes:
        is_last: Whether the stage is the last one of the pipeline.
        side_modules: The modules without parameters that every stage runs.
        poison_value: What modules of earlier stages return.
    """

    def __init__(self, module: nn.Module, stages: Sequence[Sequence[str]], index: int) -> None:
        self._call = _Call()
        self.poison_value = float("nan")
        # Each copied container with the user's one.
        self._containers: dict[nn.Module, nn.Module] = {}
        self._root = self._copy(module)
        self._names = stages[index]
        self._is_first = index == 0
        self._next_name = next(iter([*stages, [""]][index + 1]))
        self.is_last = index == len(stages) - 1
        self._takes_cache = "use_cache" in inspect.signature(module.forward).parameters
        self.side_modules = _side_modules(module, stages)
        for number, names in enumerate(stages):
            for name in names:
                submodule = module.get_submodule(name)
                # Those of this stage come with `bind`.
                if number < index:
                    self._replace(name, _Earlier(_plain_attributes(submodule), self._call))
                elif number > index:
                    plain, parameter = _plain_attributes(submodule), _first_parameter(submodule)
                    self._replace(name, _Later(plain, name, parameter))

    def bind(self, stage_module: nn.Module) -> None:
        """Take the modules of the stage, after those that sharding has replaced."""
        for name in self._names:
            self._replace(name, stage_module.get_submodule(name))
        if not self._is_first:
            first = stage_module.get_submodule(self._names[0])
            self._replace(self._names[0], _First(first, _first_parameter(first), self._call))

    def run(
        self, received: tuple[Tree, ...], args: Sequence[Tree], kwargs: Mapping[str, Tree]
    ) -> Tree:
        """Run the stage on what the stage before has sent, and on the inputs of the model.

        Raises:
            ModelError: The forward of the model does not call the modules in this order.
        """
        self._call.has_begun = self._is_first
        if not self._is_first:
            (hidden,) = received
            assert isinstance(hidden, torch.Tensor)
            self._call.received = hidden
            # One element of memory.
            value = torch.full((), self.poison_value, dtype=hidden.dtype, device=hidden.device)
            self._call.poison = value.expand(hidden.shape)
        self._update_containers()
        next_name = ""
        try:
            output = self._root(*args, **self._without_cache(kwargs))
        except _StageEnd as end:
            output, next_name = end.hidden, end.name
        finally:
            # The graph keeps it as long as backward needs it.
            self._call.received = None
        if not self._call.has_begun:
            raise _order_error(f"no call of `{self._names[0]}`")
        if next_name != self._next_name:
            raise _order_error(f"`{next_name}` after `{self._names[-1]}`")
        return output

    @contextmanager
    def all_called(self) -> Generator[None]:
        """Raise at the end if a module of the stage was not called.

        Raises:
            ModelError: A module was not called before the next stage.
        """
        called: set[str] = set()
        handles: list[torch.utils.hooks.RemovableHandle] = []
        for name in self._names:
            module = self._root.get_submodule(name)
            # Bound now: the loop changes `name`.
            hook = functools.partial(_add_name, called, name)
            handles.append(module.register_forward_pre_hook(hook))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        for name in self._names:
            if name not in called:
                raise _order_error(f"no call of `{name}`")

    def _without_cache(self, kwargs: Mapping[str, Tree]) -> Mapping[str, Tree]:
        if not self._takes_cache:
            return kwargs
        # Each stage would have the keys and values of its blocks only.
        if kwargs.get("use_cache"):
            raise ModelError(
                "a pipeline has no cache of keys and values",
                got="use_cache=True",
                fix="leave `use_cache` out, or generate on a mesh without `pp`",
            )
        return {**kwargs, "use_cache": False}

    def _copy(self, module: nn.Module) -> nn.Module:
        # Shallow: parameters, buffers and attributes are those of the user's module. Private,
        # because `setattr` would write into the dictionary of children that both have.
        container = copy.copy(module)
        container._modules = dict(module._modules)  # pyright: ignore[reportPrivateUsage]
        self._containers[container] = module
        return container

    def _replace(self, name: str, part: nn.Module) -> None:
        *parents, leaf = name.split(".")
        container = self._root
        for parent in parents:
            child = container.get_submodule(parent)
            # Once for all modules below it.
            if child not in self._containers:
                child = self._copy(child)
                container._modules[parent] = child  # pyright: ignore[reportPrivateUsage]
            container = child
        container._modules[leaf] = part  # pyright: ignore[reportPrivateUsage]

    def _update_containers(self) -> None:
        # The user may have changed attributes, such as with `model.eval()`.
        for container, module in self._containers.items():
            children = container._modules  # pyright: ignore[reportPrivateUsage]
            container.__dict__.update({**vars(module), "_modules": children})


def _add_name(called: set[str], name: str, module: nn.Module, args: object) -> None:
    called.add(name)


def _order_error(got: str) -> ModelError:
    return ModelError(
        "the model does not run the modules of the pipeline's `chain` in this order",
        got=got,
        fix="name the modules in the order in which forward calls them",
    )


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, _PLAIN) and name != "training" and not name.startswith("_")
    }


def _first_parameter(module: nn.Module) -> str:
    return next(iter(inspect.signature(module.forward).parameters), "")


def _side_modules(module: nn.Module, stages: Sequence[Sequence[str]]) -> list[nn.Module]:
    """Return the modules outside of all stages that contain none of their modules."""
    chain: list[str] = []
    for names in stages:
        chain.extend(names)
    modules: list[nn.Module] = []
    for name, submodule in module.named_modules():
        is_inside = any(name == other or name.startswith(f"{other}.") for other in chain)
        is_around = not name or any(other.startswith(f"{name}.") for other in chain)
        if not is_inside and not is_around:
            modules.append(submodule)
    return modules


@attrs.frozen(eq=False)
class OutputStructure:
    """The structure of the output of a model, whose tensors are the columns of a pipeline.

    Args:
        tree: The output, with the index of its column as a `Column` in place of each tensor.
    """

    tree: Tree

    @classmethod
    def split(cls, output: Tree) -> tuple[OutputStructure, tuple[torch.Tensor, ...]]:
        """Return the structure and the tensors of an output."""
        # In the order of the tree, which is the same in each micro-batch.
        tensors: list[torch.Tensor] = []

        def column(leaf: Tree) -> Tree:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            tensors.append(leaf)
            return Column(len(tensors) - 1)

        tree = map_leaves(column, output)
        return cls(tree), tuple(tensors)

    def join(self, tensors: Sequence[torch.Tensor]) -> Tree:
        """Return the output with other tensors."""

        def tensor(leaf: Tree) -> Tree:
            if isinstance(leaf, Column):
                return tensors[leaf.index]
            return leaf

        return map_leaves(tensor, self.tree)


class Column:
    """In place of a tensor. No record of attrs, which would be a node of the tree.

    Args:
        index: Its position.
    """

    def __init__(self, index: int) -> None:
        self.index = index
