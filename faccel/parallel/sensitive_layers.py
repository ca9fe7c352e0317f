"""The layers that low precision leaves out: by name, by pattern, or because a weight is tied."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import nn

from faccel.parallel.units import matching

# Output layers, whose rounding would go into the loss directly, and routers, which would choose
# other experts.
_SENSITIVE_LAYERS = ("classifier", "gate", "head", "lm_head", "router", "score")


def is_sensitive(name: str) -> bool:
    """Return whether the last part of a module's name names an output layer or a router.

    Effects: pure.

    Examples:
        >>> is_sensitive("model.lm_head"), is_sensitive("blocks.0.up")
        (True, False)
    """
    return name.rpartition(".")[2] in _SENSITIVE_LAYERS


def skipped_modules(
    module: nn.Module, patterns: Sequence[str] | None, is_skipped: Callable[[str], bool]
) -> set[str]:
    """Return the names of the modules that are left out, and of all modules inside.

    Effects: pure.

    Args:
        module: The model.
        patterns: Of names of modules; None leaves out what `is_skipped` selects, and the output
            layer that a model of transformers names.
        is_skipped: Whether a module with this name is left out.

    Raises:
        ConfigError: A pattern matches no module.
    """
    # A skipped module may be a container: its layers are found by the prefix of their names.
    modules = dict(module.named_modules())
    outer: list[str] = []
    if patterns is None:
        outer += filter(is_skipped, modules)
        outer += _output_embeddings(module, modules)
    else:
        for pattern in patterns:
            outer += matching(pattern, filter(None, modules), "module")
    skipped: set[str] = set(outer)
    for name in outer:
        skipped.update(inner for inner in modules if inner.startswith(f"{name}."))
    return skipped


def _output_embeddings(module: nn.Module, modules: Mapping[str, nn.Module]) -> list[str]:
    # The method by which transformers' models name their output layer.
    get_output_embeddings = getattr(module, "get_output_embeddings", None)
    if get_output_embeddings is None:
        return []
    # By identity, because models give this layer different names.
    layer = get_output_embeddings()
    return [name for name, submodule in modules.items() if submodule is layer]


def has_computed_weight(layer: nn.Module) -> bool:
    """Return whether the weight of a layer is computed, as by weight normalization and pruning.

    Effects: pure.
    """
    return "weight" not in dict(layer.named_parameters(recurse=False))


def num_owners_of_params(module: nn.Module) -> dict[int, int]:
    """Return how many modules have each parameter, by `id`.

    Effects: pure.
    """
    # `modules()` yields a module once, also where two parents have it: only a tied parameter counts
    # twice.
    counts: dict[int, int] = {}
    for submodule in module.modules():
        for param in submodule.parameters(recurse=False):
            counts[id(param)] = counts.get(id(param), 0) + 1
    return counts
