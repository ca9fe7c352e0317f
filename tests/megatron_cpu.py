"""Helper: the names of torch.cuda that Megatron-core uses, on a node without a GPU.

Megatron-core allocates with `device="cuda"` and asks `torch.cuda` for devices, streams and
generators. Nothing of its arithmetic is replaced, but the layer norm: without TransformerEngine or
Apex it refuses sequence parallel.
"""

import importlib

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


class _Stream:
    cuda_stream = 0

    def __init__(self, *args, **kwargs): ...
    def __enter__(self):
        return self

    def __exit__(self, *error):
        return False

    def wait_stream(self, *args): ...
    def wait_event(self, *args): ...
    def synchronize(self): ...
    def record(self, *args): ...


class _OnTheCpu(TorchFunctionMode):
    def __torch_function__(self, fn, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = CPU
        return fn(*args, **kwargs)


class _Generators:
    def __getitem__(self, index):
        return torch.default_generator


_TYPE = torch.Tensor.type


def _type_of(tensor, *args, **kwargs):
    """Return the name of a tensor's type as on CUDA, by which Megatron-core sorts parameters."""
    if args or kwargs:
        return _TYPE(tensor, *args, **kwargs)
    return f"torch.cuda.{_TYPE(tensor).split('.')[-1]}"


def install():
    """Replace the names, in a process that ends after the test."""
    cuda = torch.cuda
    cuda.current_device = lambda: CPU
    cuda.manual_seed = torch.manual_seed
    cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    cuda.random.get_rng_state, cuda.random.set_rng_state = cuda.get_rng_state, cuda.set_rng_state
    cuda._lazy_call = lambda fn, **kwargs: fn()
    cuda._lazy_init = lambda: None
    cuda.default_generators = _Generators()
    cuda.Stream = cuda.Event = _Stream
    cuda.current_stream = cuda.default_stream = cuda.stream = lambda *args: _Stream()
    for name in ("set_device", "synchronize", "empty_cache", "nvtx_range_push", "nvtx_range_pop"):
        setattr(cuda, name, lambda *args: None)
    for name in (
        "FloatTensor",
        "HalfTensor",
        "BFloat16Tensor",
        "IntTensor",
        "LongTensor",
        "ByteTensor",
    ):
        setattr(cuda, name, getattr(torch, name))
    torch.Tensor.cuda = torch.nn.Module.cuda = lambda self, *args, **kwargs: self
    torch.Tensor.type = _type_of
    _OnTheCpu().__enter__()
    _replace_norms()


def _replace_norms():
    class Norm(torch.nn.LayerNorm):
        def __init__(self, config, hidden_size, eps=1e-5, **kwargs):
            super().__init__(hidden_size, eps=eps)
            for param in self.parameters():
                param.sequence_parallel = config.sequence_parallel

    for module, name in (
        ("transformer.torch_norm", "WrappedTorchNorm"),
        ("transformer.transformer_block", "LayerNormImpl"),
        ("models.gpt.gpt_layer_specs", "LNImpl"),
        ("models.backends", "WrappedTorchNorm"),
        ("models.backends", "LNImpl"),
    ):
        setattr(importlib.import_module(f"megatron.core.{module}"), name, Norm)
