"""Run your own PyTorch training loop on anything: functions over an explicit, immutable `DistContext`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from faccel import backends as backends
    from faccel import errors as errors
    from faccel import func as func
    from faccel import testing as testing
    from faccel.averaging import SyncInfo as SyncInfo
    from faccel.averaging import averaged as averaged
    from faccel.averaging import local_sgd as local_sgd
    from faccel.backends.propose import plan_for as plan_for
    from faccel.backends.tensor import loss_parallel as loss_parallel
    from faccel.checkpoint.export import export_model as export_model
    from faccel.checkpoint.export import load_model as load_model
    from faccel.checkpoint.export import save_object as save_object
    from faccel.checkpoint.load import latest as latest
    from faccel.checkpoint.load import load as load
    from faccel.checkpoint.policy import KeepPolicy as KeepPolicy
    from faccel.checkpoint.policy import Moment as Moment
    from faccel.checkpoint.policy import SavePolicy as SavePolicy
    from faccel.checkpoint.policy import at_best as at_best
    from faccel.checkpoint.policy import every_seconds as every_seconds
    from faccel.checkpoint.policy import every_steps as every_steps
    from faccel.checkpoint.policy import keep_best as keep_best
    from faccel.checkpoint.policy import keep_every as keep_every
    from faccel.checkpoint.policy import keep_latest as keep_latest
    from faccel.checkpoint.policy import on_preemption as on_preemption
    from faccel.checkpoint.preemption import Preemption as Preemption
    from faccel.checkpoint.preemption import preemption as preemption
    from faccel.checkpoint.record import Checkpoint as Checkpoint
    from faccel.checkpoint.record import checkpoints as checkpoints
    from faccel.checkpoint.save import save as save
    from faccel.comm.control import Verdict as Verdict
    from faccel.comm.control import agree as agree
    from faccel.comm.control import barrier as barrier
    from faccel.comm.control import main_first as main_first
    from faccel.comm.control import on_main as on_main
    from faccel.comm.control import on_rank as on_rank
    from faccel.comm.objects import broadcast_objects as broadcast_objects
    from faccel.comm.objects import gather_objects as gather_objects
    from faccel.comm.objects import scatter as scatter
    from faccel.comm.shapes import all_to_all as all_to_all
    from faccel.comm.shapes import pad_across as pad_across
    from faccel.comm.shapes import split as split
    from faccel.comm.tensors import broadcast as broadcast
    from faccel.comm.tensors import gather as gather
    from faccel.comm.tensors import reduce as reduce
    from faccel.config import Config as Config
    from faccel.console import get_logger as get_logger
    from faccel.console import print as print
    from faccel.console import progress as progress
    from faccel.context import DistContext as DistContext
    from faccel.context import Topology as Topology
    from faccel.data.loader import ShardedLoader as ShardedLoader
    from faccel.data.loader import batches as batches
    from faccel.data.loader import shard as shard
    from faccel.data.order import Cursor as Cursor
    from faccel.data.source import Batch as Batch
    from faccel.experts import MoE as MoE
    from faccel.in_backward import step_in_backward as step_in_backward
    from faccel.joining import join as join
    from faccel.launching.call import launch as launch
    from faccel.launching.call import notebook_launch as notebook_launch
    from faccel.mesh import MeshSpec as MeshSpec
    from faccel.model import WrappedModel as WrappedModel
    from faccel.model import grad_sync as grad_sync
    from faccel.model import unwrap as unwrap
    from faccel.model import wrap as wrap
    from faccel.model import wrap_optimizer as wrap_optimizer
    from faccel.plan import Checkpointing as Checkpointing
    from faccel.plan import DdpConfig as DdpConfig
    from faccel.plan import DeepSpeedConfig as DeepSpeedConfig
    from faccel.plan import FsdpConfig as FsdpConfig
    from faccel.plan import Pipeline as Pipeline
    from faccel.plan import Plan as Plan
    from faccel.plan import PowerSgdConfig as PowerSgdConfig
    from faccel.precision import ScalerState as ScalerState
    from faccel.precision import autocast as autocast
    from faccel.precision import init_scaler as init_scaler
    from faccel.rng import RngState as RngState
    from faccel.rng import fold_in as fold_in
    from faccel.rng import rng_state as rng_state
    from faccel.rng import seed_everything as seed_everything
    from faccel.rng import set_rng_state as set_rng_state
    from faccel.runtime import init as init
    from faccel.runtime import shutdown as shutdown
    from faccel.sequence import attention as attention
    from faccel.sequence import context_parallel as context_parallel
    from faccel.sequence import split_sequence as split_sequence
    from faccel.step import Micro as Micro
    from faccel.step import StepInfo as StepInfo
    from faccel.step import Window as Window
    from faccel.step import optimizer_step as optimizer_step
    from faccel.step import pipeline_step as pipeline_step
    from faccel.step import scaled_backward as scaled_backward
    from faccel.step import windows as windows
    from faccel.track import Tracker as Tracker
    from faccel.track import Trackers as Trackers
    from faccel.track import finish as finish
    from faccel.track import init_trackers as init_trackers
    from faccel.track import log as log

_HOMES = {
    "faccel.checkpoint.export": ("export_model", "load_model", "save_object"),
    "faccel.checkpoint.load": ("latest", "load"),
    "faccel.checkpoint.policy": (
        "KeepPolicy", "Moment", "SavePolicy", "at_best", "every_seconds", "every_steps", "keep_best", "keep_every",
        "keep_latest", "on_preemption",
    ),
    "faccel.averaging": ("SyncInfo", "averaged", "local_sgd"),
    "faccel.backends.propose": ("plan_for",),
    "faccel.backends.tensor": ("loss_parallel",),
    "faccel.checkpoint.preemption": ("Preemption", "preemption"),
    "faccel.checkpoint.record": ("Checkpoint", "checkpoints"),
    "faccel.checkpoint.save": ("save",),
    "faccel.comm.control": ("Verdict", "agree", "barrier", "main_first", "on_main", "on_rank"),
    "faccel.comm.objects": ("broadcast_objects", "gather_objects", "scatter"),
    "faccel.comm.shapes": ("all_to_all", "pad_across", "split"),
    "faccel.comm.tensors": ("broadcast", "gather", "reduce"),
    "faccel.config": ("Config",),
    "faccel.context": ("DistContext", "Topology"),
    "faccel.data.loader": ("ShardedLoader", "batches", "shard"),
    "faccel.data.order": ("Cursor",),
    "faccel.data.source": ("Batch",),
    "faccel.console": ("get_logger", "print", "progress"),
    "faccel.experts": ("MoE",),
    "faccel.in_backward": ("step_in_backward",),
    "faccel.joining": ("join",),
    "faccel.launching.call": ("launch", "notebook_launch"),
    "faccel.mesh": ("MeshSpec",),
    "faccel.model": ("WrappedModel", "grad_sync", "unwrap", "wrap", "wrap_optimizer"),
    "faccel.plan": (
        "Checkpointing", "DdpConfig", "DeepSpeedConfig", "FsdpConfig", "Pipeline", "Plan", "PowerSgdConfig",
    ),
    "faccel.precision": ("ScalerState", "autocast", "init_scaler"),
    "faccel.rng": ("RngState", "fold_in", "rng_state", "seed_everything", "set_rng_state"),
    "faccel.runtime": ("init", "shutdown"),
    "faccel.track": ("Tracker", "Trackers", "finish", "init_trackers", "log"),
    "faccel.sequence": ("attention", "context_parallel", "split_sequence"),
    "faccel.step": ("Micro", "StepInfo", "Window", "optimizer_step", "pipeline_step", "scaled_backward", "windows"),
}  # fmt: skip
_MODULES = ("backends", "errors", "func", "testing")
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__version__ = "0.1.0"
__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `import faccel` itself imports nothing, not even torch."""
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
    elif name in _MODULES:
        value = importlib.import_module(f"faccel.{name}")
    else:
        raise AttributeError(f"faccel has no attribute `{name}`")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*_HOME, *_MODULES, "__version__"])
