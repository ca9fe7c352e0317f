"""Linear layers in fp8: which layers of a model are converted, and their conversion in place."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import attrs
import torch
from torch import nn

from faccel.context import DistContext
from faccel.device_table import DeviceKind, fp8_capability, kind_of
from faccel.errors import BackendError, ConfigError, DeviceError, short_repr
from faccel.parallel.sensitive_layers import (
    has_computed_weight,
    is_sensitive,
    num_owners_of_params,
    skipped_modules,
)
from faccel.parallel.transformer_engine import check_plan, check_recipe, multiple_of
from faccel.plan import Fp8, Plan

_logger = logging.getLogger(__name__)


@attrs.frozen(eq=False)
class Fp8Layers:
    """The linear layers of a model that multiply in fp8.

    Args:
        layers: The layers by name.
        options: How they multiply.
    """

    layers: Mapping[str, nn.Linear]
    options: Fp8

    def without(self, names: Iterable[str]) -> Fp8Layers:
        """Return the same without the layers of these names."""
        removed = set(names)
        layers = {name: layer for name, layer in self.layers.items() if name not in removed}
        return attrs.evolve(self, layers=layers)

    def only(self, names: Iterable[str]) -> Fp8Layers:
        """Return the same with the layers of these names only."""
        return attrs.evolve(self, layers={name: self.layers[name] for name in names})

    def convert(self, *, all_gather: bool = False) -> None:
        """Convert the layers in place. Updates them: their class is one of the backend then.

        Names, parameters, hooks and the modules themselves stay.

        Args:
            all_gather: Whether FSDP2 will gather the weights in fp8. They become tensors of
                torchao's class, which cast themselves before they are gathered.
        """
        library = _LIBRARIES[self.options.backend]
        for layer in self.layers.values():
            library.convert(layer, self.options, all_gather=all_gather)


def fp8_layers(module: nn.Module, plan: Plan, ctx: DistContext) -> Fp8Layers:
    """Return the layers of `module` that fp8 applies to: none with another `mixed_precision`.

    Rank 0 logs which layers stay in bf16, and which will gain nothing.

    Raises:
        ConfigError: The plan has `fp8` and the precision is another, `skip` matches nothing, or the
            backend does not run as planned.
        DeviceError: The device does not multiply in fp8, and `emulate` is off.
        BackendError: The package of the backend is not installed, or does not have the recipe.
    """
    precision = ctx.config.mixed_precision
    if precision != "fp8":
        if plan.fp8 is not None:
            raise ConfigError(
                '`Plan(fp8=...)` needs `mixed_precision="fp8"`',
                got=f"mixed_precision={short_repr(precision)}",
                fix='write `faccel.init(mixed_precision="fp8")`, or leave `fp8` out of the plan',
            )
        return Fp8Layers({}, Fp8())
    options = plan.fp8 or Fp8()
    library = _LIBRARIES[options.backend]
    library.check_plan(options, plan, ctx)
    _check_device(options, ctx.device)
    _check_installed(options)
    library.check_recipe(options)
    layers = _linear_layers(module)
    reasons = _reasons_for_bf16(module, layers, options)
    layers = {name: layer for name, layer in layers.items() if name not in reasons}
    if ctx.is_main:
        _report(module, layers, reasons, plan, options)
    return Fp8Layers(layers, options)


def _check_device(options: Fp8, device: torch.device) -> None:
    """Raise unless the device multiplies matrices in fp8, or the plan emulates it."""
    if options.emulate:
        return
    capability = fp8_capability(device)
    needed = _needed_capability(options.recipe, kind_of(device))
    if capability is None or needed is None:
        raise DeviceError(
            "this device does not multiply in fp8",
            got=f"the device `{device}`",
            fix='use `mixed_precision="bf16"`; or, to compute the same numbers slowly, write '
            "`plan=faccel.Plan(fp8=faccel.parallel.Fp8(emulate=True))`",
        )
    if capability < needed:
        other = 'use `mixed_precision="bf16"`'
        if capability >= (kind_of(device).fp8_capability or needed):
            other = 'use `recipe="tensorwise"` or `mixed_precision="bf16"`'
        raise DeviceError(
            f"the recipe {short_repr(options.recipe)} of fp8 needs a device of compute capability "
            f"{needed[0]}.{needed[1]}",
            got=f"`{device}` of compute capability {capability[0]}.{capability[1]}",
            fix=f"{other}; or, to compute in fp8 slowly, write "
            "`plan=faccel.Plan(fp8=faccel.parallel.Fp8(emulate=True))`",
        )


def _needed_capability(recipe: str, kind: DeviceKind) -> tuple[int, int] | None:
    """Return the compute capability from which devices of a kind run a recipe."""
    if recipe == "mxfp8":
        return kind.mxfp8_capability
    if recipe.startswith("rowwise"):
        return kind.fp8_rowwise_capability
    return kind.fp8_capability


def _check_installed(options: Fp8) -> None:
    library = _LIBRARIES[options.backend]
    if importlib.util.find_spec(library.package) is None:
        raise BackendError(
            f'fp8 with `backend="{options.backend}"` needs the package `{library.package}`',
            got="no such package",
            fix=f"run `pip install {library.requirement}`",
        )


def _linear_layers(module: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers by name, those that are in fp8 already not among them."""
    layers: dict[str, nn.Linear] = {}
    for name, submodule in module.named_modules():
        # Subclasses compute something else in `forward`, or their owner reads the weight.
        if type(submodule) is nn.Linear:
            layers[name] = submodule  # noqa: PERF403
    return layers


def _reasons_for_bf16(
    module: nn.Module, layers: Mapping[str, nn.Linear], options: Fp8
) -> dict[str, str]:
    """Return why layers stay in bf16, by name."""
    skipped = skipped_modules(module, options.skip, is_sensitive)
    num_owners = num_owners_of_params(module)
    multiple = multiple_of(options)
    reasons: dict[str, str] = {}
    for name, layer in layers.items():
        num_columns, num_rows = layer.weight.shape
        if name in skipped:
            reasons[name] = "skipped"
        elif num_columns % multiple or num_rows % multiple:
            reasons[name] = f"{num_columns} x {num_rows}, not multiples of {multiple}"
        elif has_computed_weight(layer):
            reasons[name] = "its weight is computed"
        elif num_owners[id(layer.weight)] > 1:
            reasons[name] = "its weight is tied"
        elif "forward" in vars(layer):
            reasons[name] = "its `forward` was replaced"
    return reasons


def _report(
    module: nn.Module,
    layers: Mapping[str, nn.Linear],
    reasons: Mapping[str, str],
    plan: Plan,
    options: Fp8,
) -> None:
    """Log how many layers are in fp8, and a warning of what makes it slower than bf16."""
    name = type(module).__name__
    total = len(layers) + len(reasons)
    _logger.info("fp8 in %d of %d linear layers of %s", len(layers), total, name)
    unexpected = {name: reason for name, reason in reasons.items() if reason != "skipped"}
    if unexpected:
        listed = _listed([f"`{name}` ({reason})" for name, reason in unexpected.items()])
        _logger.warning("%d linear layers of %s stay in bf16: %s", len(unexpected), name, listed)
    if not layers:
        _logger.warning("%s has no linear layer in fp8", name)
        return
    small = [f"`{name}`" for name, layer in layers.items() if is_too_small(layer, options.recipe)]
    if small:
        _logger.warning(
            "%d linear layers of %s are too small to gain from fp8 (%s): %s. Name them in "
            "`Fp8(skip=...)`, or use bf16",
            len(small),
            name,
            options.recipe,
            _listed(small),
        )
    if plan.compile is None and not _LIBRARIES[options.backend].has_fused_casts:
        _logger.warning(
            "%s is not compiled: casts to fp8 are then slower than what fp8 gains. "
            'Write `Plan(compile="units")`',
            name,
        )


def _listed(texts: Sequence[str]) -> str:
    """Return the first texts: a model may have hundreds of layers."""
    listed = ", ".join(texts[:4])
    if len(texts) > 4:
        listed += f" and {len(texts) - 4} more"
    return listed


def is_too_small(layer: nn.Linear, recipe: str) -> bool:
    """Return whether fp8 is slower than bf16 for a layer of this size.

    The sizes are those that torchao measured on an H100
    (https://github.com/pytorch/ao/tree/main/torchao/float8#performance).

    Examples:
        >>> is_too_small(nn.Linear(1024, 1024, device="meta"), "tensorwise")
        True
        >>> is_too_small(nn.Linear(8192, 8192, device="meta"), "tensorwise")
        False
    """
    num_columns, num_rows = layer.weight.shape
    if not recipe.startswith("rowwise"):
        return num_rows <= 4096 and num_columns <= 1024
    is_narrow = num_columns <= 2048 or num_rows <= 1024
    return is_narrow or (num_columns <= 4096 and num_rows <= 2048)


def _convert_with_torchao(layer: nn.Linear, options: Fp8, *, all_gather: bool) -> None:
    """Make a layer one of torchao, in place. Updates `layer`."""
    from torchao.float8 import convert_to_float8_training

    converted: Any = convert_to_float8_training(
        layer, config=_torchao_config(options, all_gather=all_gather)
    )
    # torchao returns another module. In place, hooks, other names of the module and references to
    # it stay valid; FSDP2 changes classes in the same way.
    for name, value in vars(converted).items():
        vars(layer).setdefault(name, value)
    if all_gather:
        layer.weight = converted.weight
    layer.__class__ = _layer_class()


def _torchao_config(options: Fp8, *, all_gather: bool) -> Any:
    from torchao.float8 import Float8LinearConfig

    # With padding: the number of rows of a batch need not be a multiple of 16.
    return dataclasses.replace(
        Float8LinearConfig.from_recipe_name(options.recipe),
        emulate=options.emulate,
        pad_inner_dim=True,
        enable_fsdp_float8_all_gather=all_gather,
    )


@functools.cache
def _layer_class() -> type[nn.Linear]:
    """Return the class of fp8 layers. Made when it is needed: torchao is slow to import."""
    from torchao.float8.float8_linear import Float8Linear

    class AutocastFloat8Linear(Float8Linear):
        """torchao's layer, whose input autocast casts on every device. It does so on CUDA only."""

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            device_type = input.device.type
            if torch.is_autocast_enabled(device_type):
                input = input.to(torch.get_autocast_dtype(device_type))
            return super().forward(input)

    # The name that `print(model)` shows.
    AutocastFloat8Linear.__name__ = AutocastFloat8Linear.__qualname__ = "Float8Linear"
    return AutocastFloat8Linear


def _convert_with_transformer_engine(layer: nn.Linear, options: Fp8, *, all_gather: bool) -> None:
    from faccel.parallel.transformer_engine import convert

    convert(layer, options)


def _any_plan(options: Fp8, plan: Plan, ctx: DistContext) -> None:
    pass  # torchao's layers run as planned


def _any_recipe(options: Fp8) -> None:
    pass  # of torchao, all are installed


class ConvertLayer(Protocol):
    """Converts a layer in place. Updates it."""

    def __call__(self, layer: nn.Linear, options: Fp8, *, all_gather: bool) -> None:
        """Convert `layer`; with `all_gather`, FSDP2 will gather its weight in fp8."""
        ...


@attrs.frozen
class _Library:
    """A library that multiplies in fp8.

    Args:
        package: The name under which it is imported.
        requirement: What to install.
        convert: Converts a layer.
        check_plan: Raises where its layers cannot run as planned.
        check_recipe: Raises where the installed version does not have a recipe.
        has_fused_casts: Whether its kernels cast, without compilation.
    """

    package: str
    requirement: str
    convert: ConvertLayer
    check_plan: Callable[[Fp8, Plan, DistContext], None] = _any_plan
    check_recipe: Callable[[Fp8], None] = _any_recipe
    has_fused_casts: bool = False


_LIBRARIES: Mapping[str, _Library] = {
    "te": _Library(
        "transformer_engine",
        '--no-build-isolation "transformer_engine[pytorch]"',
        _convert_with_transformer_engine,
        check_plan,
        check_recipe,
        has_fused_casts=True,
    ),
    "torchao": _Library("torchao", '"faccel[ao]"', _convert_with_torchao),
}
