"""What happens to the units of a model: activation checkpointing, compilation, fp8."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import attrs

from faccel.checks import instance_of, shown
from faccel.errors import ConfigError, short_repr
from faccel.validators import (
    bool_field,
    boolean,
    choice,
    construct,
    int_at_least,
    patterns,
    positive_number,
    text,
)


@attrs.frozen(kw_only=True)
class ActivationCheckpointing:
    """Activation checkpointing: activations are not kept for backward, but computed a second time.

    Args:
        every: Every `every`-th unit is checkpointed; 1 is all of them.
        save_ops: Names of operators whose results are kept, such as `"aten.mm.default"` (selective
            checkpointing).
        memory_budget: Fraction of the activations that the compiler may keep: above 0, and at most
            1, which keeps everything. Needs `Plan(compile=...)`.
    """

    every: int = attrs.field(default=1, validator=positive_number())
    save_ops: tuple[str, ...] = attrs.field(default=(), converter=patterns)
    memory_budget: float | None = attrs.field(
        default=None, validator=positive_number(optional=True)
    )


def to_activation_checkpoint(value: object) -> ActivationCheckpointing | None:
    """Return the record for `"full"`, or `n` for every n-th unit.

    Effects: pure.
    """
    if value is None or isinstance(value, ActivationCheckpointing):
        return value
    # the short forms of the common cases
    if value == "full":
        return ActivationCheckpointing()
    # a bool is an int in Python: `True` must raise instead of being read as 1
    if isinstance(value, int) and not isinstance(value, bool):
        return ActivationCheckpointing(every=value)
    raise ConfigError(
        "`activation_checkpoint` must be 'full', an int or an `ActivationCheckpointing`",
        got=short_repr(value),
        fix='write `activation_checkpoint="full"`, or `activation_checkpoint=2` for every second '
        "unit",
    )


COMPILED = ("units", "whole")
"""What can be compiled: each unit, or the model."""


def _options(value: object) -> Mapping[str, object] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise ConfigError(
            "`options` must be a mapping from names of Inductor's options to values",
            got=shown(value),
            fix='write `options={"epilogue_fusion": True}`',
        )
    return MappingProxyType(dict(value))


@attrs.frozen
class Compile:
    """What is compiled, and the arguments of `torch.compile`.

    Args:
        what: `"whole"` is the model, `"units"` each unit: units of one class are compiled once.
        mode: `"reduce-overhead"`, `"max-autotune"`, ...; None is PyTorch's default.
        dynamic: Whether shapes are variables of the graph; None makes those variable that change.
        fullgraph: Whether a part that cannot be in the graph is an error.
        backend: The name of a compiler, as in `torch._dynamo.list_backends()`.
        options: Options of the compiler, instead of a `mode`.

    Examples:
        >>> Compile("units", mode="max-autotune").mode
        'max-autotune'
    """

    what: str = attrs.field(default="whole", validator=choice(*COMPILED))
    mode: str | None = attrs.field(default=None, validator=text("max-autotune", optional=True))
    dynamic: bool | None = attrs.field(default=None, validator=boolean(optional=True))
    fullgraph: bool = bool_field(default=False)
    backend: str = attrs.field(default="inductor", validator=text("inductor"))
    options: Mapping[str, object] | None = attrs.field(default=None, converter=_options)

    def __attrs_post_init__(self) -> None:
        if self.mode is not None and self.options is not None:  # as `torch.compile` raises
            raise ConfigError(
                "`mode` and `options` exclude each other",
                got=f"mode={short_repr(self.mode)}",
                fix="remove one of the two",
            )

    def __reduce__(self) -> tuple[Callable[..., Compile], tuple[object, ...]]:
        fields = attrs.asdict(self, recurse=False)
        if self.options is not None:
            fields["options"] = dict(self.options)
        return construct, (Compile, fields)


def to_compile(value: object) -> Compile | None:
    """Return the record for `"whole"` or `"units"`.

    Effects: pure.
    """
    if value is None or isinstance(value, Compile):
        return value
    # The short form: `torch.compile` with its defaults.
    if isinstance(value, str) and value in COMPILED:
        return Compile(value)
    raise ConfigError(
        "`compile` must be 'whole', 'units' or a `Compile`",
        got=short_repr(value),
        fix='write `compile="units"`, or `compile=faccel.parallel.Compile("units", mode=...)`',
    )


FP8_RECIPES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "te": ("delayed", "mxfp8", "tensorwise"),
        "torchao": ("rowwise", "rowwise_with_gw_hp", "tensorwise"),
    }
)
"""How fp8 layers scale their operands, by the library that multiplies."""
_ALL_FP8_RECIPES = sorted({name for names in FP8_RECIPES.values() for name in names})
_HISTORY_OPTIONS = ("margin", "amax_history", "amax")


def _fp8_format(value: Any) -> Any:
    # Each recipe of Transformer Engine asserts that it is another one.
    if value == "e5m2":
        raise ConfigError(
            "Transformer Engine does not train with all tensors in e5m2",
            got="format='e5m2'",
            fix='write `format="hybrid"`: e4m3 in forward, and e5m2 for gradients',
        )
    return value


@attrs.frozen(kw_only=True)
class TransformerEngineConfig:
    """The options of NVIDIA's Transformer Engine, for `Fp8(backend="te", te=...)`.

    Args:
        format: `"hybrid"`: e4m3 in forward, e5m2 for gradients. `"e4m3"`: both in e4m3. None is
            `"e4m3"` for the recipe `"mxfp8"`, and `"hybrid"` for the others.
        in_eval: Whether the layers also multiply in fp8 after `model.eval()`; False is bf16.
        margin: For `"delayed"`: scales are divided by `2**margin`. None is 0.
        amax_history: For `"delayed"`: the number of forwards whose largest elements are kept. None
            is 1024.
        amax: For `"delayed"`: which element a scale is computed from: the largest in the history,
            `"max"`, or in the last forward, `"most_recent"`. None is `"max"`.

    Examples:
        >>> TransformerEngineConfig(amax_history=16, in_eval=False).amax_history
        16
    """

    format: str | None = attrs.field(
        default=None, converter=_fp8_format, validator=choice("e4m3", "hybrid", optional=True)
    )
    in_eval: bool = bool_field(default=True)
    margin: int | None = attrs.field(default=None, validator=int_at_least(0, optional=True))
    amax_history: int | None = attrs.field(default=None, validator=int_at_least(1, optional=True))
    amax: str | None = attrs.field(
        default=None, validator=choice("max", "most_recent", optional=True)
    )


@attrs.frozen(kw_only=True)
class Fp8:
    """Linear layers that multiply in fp8, for `mixed_precision="fp8"`.

    Args:
        recipe: `"tensorwise"`: one scale for each operand, computed from it. With torchao also
            `"rowwise"`: one for each row, more exact; and `"rowwise_with_gw_hp"`: rowwise, with
            weight gradients in bf16. With Transformer Engine also `"mxfp8"`: one for each 32
            elements; and `"delayed"`: one for each operand, computed from earlier forwards.
        backend: `"torchao"`, or `"te"` for NVIDIA's Transformer Engine.
        skip: Patterns of the names of modules that stay in bf16, with all layers inside. None is
            the output layer and the routers of experts: modules with the name `head`, `lm_head`,
            `classifier`, `score`, `router` or `gate`, and what `get_output_embeddings()` of a
            transformers model returns.
        all_gather: Whether FSDP2 gathers the weights of these layers in fp8, a quarter of the bytes
            of fp32. For `"tensorwise"` of torchao; the other recipes gather weights as stored.
        emulate: Whether to compute with rounded values in fp32, on any device. It is slow, for
            tests of the numbers without the hardware. For torchao.
        te: The options of Transformer Engine, for `backend="te"`; None is its defaults.

    Examples:
        >>> Fp8(recipe="rowwise", skip=("head", "blocks.0")).skip
        ('head', 'blocks.0')
        >>> Fp8(backend="te", recipe="mxfp8", te=TransformerEngineConfig(format="e4m3")).recipe
        'mxfp8'
    """

    recipe: str = attrs.field(default="tensorwise", validator=choice(*_ALL_FP8_RECIPES))
    backend: str = attrs.field(default="torchao", validator=choice(*FP8_RECIPES))
    skip: tuple[str, ...] | None = attrs.field(
        default=None, converter=attrs.converters.optional(patterns)
    )
    all_gather: bool = bool_field(default=True)
    emulate: bool = bool_field(default=False)
    te: TransformerEngineConfig | None = None

    def __attrs_post_init__(self) -> None:
        if self.te is not None:
            fix = 'write `te=faccel.parallel.TransformerEngineConfig(format="hybrid")`'
            instance_of("te", self.te, TransformerEngineConfig, fix=fix)
            if self.backend != "te":
                raise ConfigError(
                    '`te` has the options of `backend="te"`',
                    got=f"backend={short_repr(self.backend)}",
                    fix='write `backend="te"`, or leave `te` out',
                )
        self._check_recipe()
        self._check_emulation()
        self._check_history()

    def _check_recipe(self) -> None:
        recipes = FP8_RECIPES[self.backend]
        if self.recipe in recipes:
            return
        (other,) = (name for name in FP8_RECIPES if self.recipe in FP8_RECIPES[name])
        raise ConfigError(
            f'`backend="{self.backend}"` has no recipe {short_repr(self.recipe)}',
            got=f"recipe={short_repr(self.recipe)}, backend={short_repr(self.backend)}",
            fix=f'write `backend="{other}"`, or one of the recipes {", ".join(recipes)}',
        )

    def _check_emulation(self) -> None:
        if self.emulate and self.backend != "torchao":
            raise ConfigError(
                '`backend="te"` computes on GPUs only, and does not emulate',
                got="emulate=True",
                fix='write `backend="torchao"`, or leave `emulate` out',
            )

    def _check_history(self) -> None:
        if self.te is None or self.recipe == "delayed":
            return
        for name in _HISTORY_OPTIONS:
            value = getattr(self.te, name)
            if value is not None:
                raise ConfigError(
                    f'`{name}` is an option of the recipe "delayed": '
                    f"{short_repr(self.recipe)} keeps no history",
                    got=f"{name}={short_repr(value)}, recipe={short_repr(self.recipe)}",
                    fix=f'remove `{name}`, or write `recipe="delayed"`',
                )


STORAGE_DTYPES = ("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")
"""The dtypes in which layers can be stored, under PyTorch's names."""


@attrs.frozen(kw_only=True)
class LayerwiseCasting:
    """Frozen layers that are stored in a smaller dtype than they compute in.

    Each linear or convolution layer casts its parameters at the start of its forward, to the dtype
    of autocast, else to the one they had before `wrap`. Layers with a trainable parameter stay.

    Args:
        storage_dtype: `"float8_e4m3fn"`, `"float8_e5m2"`, `"bfloat16"` or `"float16"`.
        skip: Patterns of the names of modules that stay as they are, with all layers inside. None
            is the modules of `Fp8.skip`, and those whose name contains `norm` or `embed`, or is
            `proj_in` or `proj_out`.

    Examples:
        >>> LayerwiseCasting(skip="head").storage_dtype
        'float8_e4m3fn'
    """

    storage_dtype: str = attrs.field(default="float8_e4m3fn", validator=choice(*STORAGE_DTYPES))
    skip: tuple[str, ...] | None = attrs.field(
        default=None, converter=attrs.converters.optional(patterns)
    )


def to_layerwise_casting(value: object) -> LayerwiseCasting | None:
    """Return the record; `value` may be the dtype alone.

    Effects: pure.

    Examples:
        >>> to_layerwise_casting("bfloat16") == LayerwiseCasting(storage_dtype="bfloat16")
        True
    """
    if value is None or isinstance(value, LayerwiseCasting):
        return value
    if isinstance(value, str) and value in STORAGE_DTYPES:
        return LayerwiseCasting(storage_dtype=value)
    raise ConfigError(
        "`layerwise_casting` must be a dtype to store layers in, or a `LayerwiseCasting`",
        got=short_repr(value),
        fix='write `layerwise_casting="float8_e4m3fn"`',
    )
