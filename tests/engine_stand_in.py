"""A stand-in for Transformer Engine, which needs a GPU: the signatures of its version 2.15.

Its layers compute in the precision around them. What it keeps of the library are the rules that
faccel must follow: operands have multiples of rows, a context contains a forward of a layer, and
histories move by one where the outermost context ends.
"""

import contextlib
import enum
import sys
import threading
import types
from collections.abc import Callable

import attrs
import torch
from torch import nn

import faccel
from faccel import device_table
from faccel.parallel import transformer_engine


class Format(enum.Enum):
    """The formats of `transformer_engine.common.recipe`."""

    E4M3 = "E4M3"
    E5M2 = "E5M2"
    HYBRID = "HYBRID"


@attrs.frozen
class DelayedScaling:
    """The recipe with histories."""

    margin: int = 0
    fp8_format: Format = Format.HYBRID
    amax_history_len: int = 1024
    amax_compute_algo: str = "max"
    scaling_factor_compute_algo: Callable | None = None
    reduce_amax: bool = True


@attrs.frozen
class Float8CurrentScaling:
    """One scale for each operand."""

    fp8_format: Format = Format.HYBRID


@attrs.frozen
class MXFP8BlockScaling:
    """One scale for each 32 elements."""

    margin: int = 0
    fp8_format: Format = Format.E4M3


class Calls(threading.local):
    """What a rank, which is a thread, has called.

    Attributes:
        contexts: The contexts around the present call, outermost first: on or off, and the recipe.
        forwards: Those around each forward of a layer.
        is_first: Whether no layer has run in the outermost context.
        num_updates: How many times histories have moved.
        num_grad_updates: How many times those of gradients have.
    """

    def __init__(self):
        self.contexts = []
        self.forwards = []
        self.is_first = False
        self.num_updates = 0
        self.num_grad_updates = 0


class StandIn:
    """The functions of `transformer_engine.pytorch`."""

    def __init__(self):
        self.calls = Calls()
        self.mxfp8 = (True, "")
        stand_in = self

        class Linear(nn.Linear):
            def __init__(
                self, in_features, out_features, bias=True, params_dtype=None, device="cuda"
            ):
                super().__init__(in_features, out_features, bias, device, params_dtype)
                self.register_buffer("_extra_state", torch.zeros(1))

            def forward(self, inp):
                stand_in.check_rows(inp)
                stand_in.calls.forwards.append(tuple(stand_in.calls.contexts))
                out = super().forward(inp)
                if stand_in.is_first_with_history() and out.requires_grad:
                    out.register_hook(stand_in.update_grad_history)
                return out

        self.Linear = Linear

    def is_first_with_history(self):
        """Whether the histories of gradients move in the backward of this layer."""
        is_first, self.calls.is_first = self.calls.is_first, False
        return is_first and self.calls.contexts[-1][0] and self.has_history()

    def has_history(self):
        """Whether the recipe of the present context has histories."""
        return isinstance(self.calls.contexts[-1][1], DelayedScaling)

    def update_grad_history(self, grad):
        """Count a move; a hook of the output of a layer."""
        self.calls.num_grad_updates += 1

    def check_rows(self, inp):
        """Raise as the library does for a number of rows that is no multiple."""
        is_enabled, recipe = self.calls.contexts[-1] if self.calls.contexts else (False, None)
        multiple = 32 if isinstance(recipe, MXFP8BlockScaling) else 16
        rows = inp.numel() // inp.shape[-1]
        assert not is_enabled or rows % multiple == 0, f"{rows} rows"

    @contextlib.contextmanager
    def autocast(self, enabled=True, calibrating=False, recipe=None, amax_reduction_group=None):
        """The context of version 2.9."""
        calls = self.calls
        before = calls.is_first
        calls.is_first = calls.is_first or not calls.contexts
        calls.contexts.append((enabled, recipe))
        try:
            yield
            if len(calls.contexts) == 1 and enabled and torch.is_grad_enabled():
                calls.num_updates += self.has_history()
        finally:
            calls.contexts.pop()
            calls.is_first = before  # the library restores what it was

    def is_mxfp8_available(self, return_reason=False):
        """Whether the GPU has MXFP8, and why not."""
        return self.mxfp8 if return_reason else self.mxfp8[0]


RECIPES = (DelayedScaling, Float8CurrentScaling, MXFP8BlockScaling)


def install(monkeypatch, recipes=RECIPES, **changes):
    """Install a stand-in as the package; return it. `changes` replace its attributes.

    The CPU then counts as a GPU of compute capability 10.0, and computes in fp32 or bf16.
    """
    stand_in = StandIn()
    engine = types.SimpleNamespace(
        Linear=stand_in.Linear,
        autocast=stand_in.autocast,
        is_mxfp8_available=stand_in.is_mxfp8_available,
    )
    vars(engine).update(changes)
    names = {recipe.__name__: recipe for recipe in recipes}
    package = types.ModuleType("transformer_engine")
    package.__spec__ = types.SimpleNamespace(name="transformer_engine")
    monkeypatch.setitem(sys.modules, "transformer_engine", package)
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", engine)
    common = types.SimpleNamespace(Format=Format, **names)
    monkeypatch.setitem(sys.modules, "transformer_engine.common.recipe", common)
    transformer_engine.recipe_of.cache_clear()
    set_capability(monkeypatch, (10, 0))
    return stand_in


def set_capability(monkeypatch, capability):
    """Let the CPU count as a GPU of this compute capability."""
    cuda = device_table.KINDS["cuda"]
    cpu = attrs.evolve(
        device_table.KINDS["cpu"],
        fp8_capability=cuda.fp8_capability,
        fp8_rowwise_capability=cuda.fp8_rowwise_capability,
        mxfp8_capability=cuda.mxfp8_capability,
    )
    monkeypatch.setattr(device_table, "KINDS", {**device_table.KINDS, "cpu": cpu})
    module = types.SimpleNamespace(**vars(torch.cpu))
    module.get_device_capability = lambda device: capability
    monkeypatch.setattr(torch, "get_device_module", lambda device=None: module)


FP8 = {"mixed_precision": "fp8"}


def plan_of(recipe="tensorwise", te=None, **fields):
    """Return a plan with a recipe of Transformer Engine."""
    fp8 = faccel.parallel.Fp8(backend="te", recipe=recipe, te=te)
    return faccel.Plan(fp8=fp8, **fields)
