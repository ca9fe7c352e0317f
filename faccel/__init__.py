"""Run a plain PyTorch training loop on any hardware, with an explicit, immutable context."""

from __future__ import annotations

from typing import TYPE_CHECKING

from faccel.exports import lazy

if TYPE_CHECKING:
    from faccel import backends as backends
    from faccel import checkpoint as checkpoint
    from faccel import comm as comm
    from faccel import data as data
    from faccel import errors as errors
    from faccel import func as func
    from faccel import inference as inference
    from faccel import parallel as parallel
    from faccel import random as random
    from faccel import testing as testing
    from faccel import tracking as tracking
    from faccel import tree as tree
    from faccel.checkpoint.load import latest as latest
    from faccel.checkpoint.load import load as load
    from faccel.checkpoint.preemption import preemption as preemption
    from faccel.checkpoint.save import save as save
    from faccel.comm.control import agree as agree
    from faccel.comm.control import barrier as barrier
    from faccel.comm.control import main_first as main_first
    from faccel.comm.control import on_main as on_main
    from faccel.comm.control import on_rank as on_rank
    from faccel.comm.objects import broadcast_objects as broadcast_objects
    from faccel.comm.objects import gather_objects as gather_objects
    from faccel.comm.shapes import split as split
    from faccel.comm.tensors import broadcast as broadcast
    from faccel.comm.tensors import gather as gather
    from faccel.comm.tensors import reduce as reduce
    from faccel.config import Config as Config
    from faccel.context import DistContext as DistContext
    from faccel.context import Topology as Topology
    from faccel.data.batch import Batch as Batch
    from faccel.data.loader import ShardedLoader as ShardedLoader
    from faccel.data.loader import batches as batches
    from faccel.data.loader import shard as shard
    from faccel.data.order import Cursor as Cursor
    from faccel.launching.functions import launch as launch
    from faccel.launching.functions import notebook_launch as notebook_launch
    from faccel.mesh import MeshSpec as MeshSpec
    from faccel.plan import Plan as Plan
    from faccel.random.seeding import rng_state as rng_state
    from faccel.random.seeding import seed_everything as seed_everything
    from faccel.random.seeding import set_rng_state as set_rng_state
    from faccel.runtime.initialize import init as init
    from faccel.runtime.initialize import shutdown as shutdown
    from faccel.tracking.console import print as print
    from faccel.tracking.progress import progress as progress
    from faccel.tracking.rank_logger import get_logger as get_logger
    from faccel.training.backward import scaled_backward as scaled_backward
    from faccel.training.batch_size import find_batch_size as find_batch_size
    from faccel.training.failure_policy import Retry as Retry
    from faccel.training.forward_backward import forward_backward as forward_backward
    from faccel.training.gradients import grad_norm as grad_norm
    from faccel.training.gradients import unscale as unscale
    from faccel.training.model import WrappedModel as WrappedModel
    from faccel.training.model import grad_sync as grad_sync
    from faccel.training.model import unwrap as unwrap
    from faccel.training.model import wrap as wrap
    from faccel.training.optimizer_binding import wrap_optimizer as wrap_optimizer
    from faccel.training.precision import ScalerState as ScalerState
    from faccel.training.precision import autocast as autocast
    from faccel.training.precision import init_scaler as init_scaler
    from faccel.training.rewrap import rewrap as rewrap
    from faccel.training.step import StepInfo as StepInfo
    from faccel.training.step import optimizer_step as optimizer_step
    from faccel.training.windows import MicroBatch as MicroBatch
    from faccel.training.windows import Window as Window
    from faccel.training.windows import windows as windows

_NAMES = {
    "faccel.checkpoint.load": ("latest", "load"),
    "faccel.checkpoint.preemption": ("preemption",),
    "faccel.checkpoint.save": ("save",),
    "faccel.comm.control": ("agree", "barrier", "main_first", "on_main", "on_rank"),
    "faccel.comm.objects": ("broadcast_objects", "gather_objects"),
    "faccel.comm.shapes": ("split",),
    "faccel.comm.tensors": ("broadcast", "gather", "reduce"),
    "faccel.config": ("Config",),
    "faccel.context": ("DistContext", "Topology"),
    "faccel.data.loader": ("ShardedLoader", "batches", "shard"),
    "faccel.data.order": ("Cursor",),
    "faccel.data.batch": ("Batch",),
    "faccel.launching.functions": ("launch", "notebook_launch"),
    "faccel.mesh": ("MeshSpec",),
    "faccel.plan": ("Plan",),
    "faccel.random.seeding": ("rng_state", "seed_everything", "set_rng_state"),
    "faccel.runtime.initialize": ("init", "shutdown"),
    "faccel.tracking.console": ("print",),
    "faccel.tracking.progress": ("progress",),
    "faccel.tracking.rank_logger": ("get_logger",),
    "faccel.training.backward": ("scaled_backward",),
    "faccel.training.batch_size": ("find_batch_size",),
    "faccel.training.failure_policy": ("Retry",),
    "faccel.training.forward_backward": ("forward_backward",),
    "faccel.training.gradients": ("grad_norm", "unscale"),
    "faccel.training.model": ("WrappedModel", "grad_sync", "unwrap", "wrap"),
    "faccel.training.optimizer_binding": ("wrap_optimizer",),
    "faccel.training.precision": ("ScalerState", "autocast", "init_scaler"),
    "faccel.training.rewrap": ("rewrap",),
    "faccel.training.step": ("StepInfo", "optimizer_step"),
    "faccel.training.windows": ("MicroBatch", "Window", "windows"),
}  # fmt: skip
_NAMESPACES = (
    "backends", "checkpoint", "comm", "data", "errors", "func", "inference", "parallel", "random",
    "testing", "tracking", "tree",
)  # fmt: skip

# For the error message: names of Accelerate and Lightning Fabric that have no similar name here,
# and names that live in a namespace.
_HINTS = {
    "Accelerator": "`ctx = faccel.init()`",
    "AcceleratorState": "`ctx = faccel.init()`",
    "Fabric": "`ctx = faccel.init()`",
    "PartialState": "`ctx = faccel.init()`",
    "accumulate": "`faccel.windows(loader, ctx, size=4)`",
    "backward": "`scaler = faccel.scaled_backward(loss, scaler, ctx)`",
    "clip_grad_norm_": "`faccel.optimizer_step(opt, scaler, ctx, clip_norm=1.0)`",
    "unscale_": "`scaler = faccel.unscale(opt, scaler, ctx)`",
    "unscale_gradients": "`scaler = faccel.unscale(opt, scaler, ctx)`",
    "gather_for_metrics": "`faccel.gather(x, ctx, num_valid=batch.num_valid)`",
    "init_ema": "`faccel.parallel.init_ema(model, ctx)`",
    "is_main_process": "`ctx.is_main`",
    "prepare": "`faccel.wrap`, `faccel.wrap_optimizer` and `faccel.shard`",
    "set_seed": "`faccel.seed_everything(seed, ctx)`",
    "setup": "`faccel.wrap` and `faccel.wrap_optimizer`",
    "setup_dataloaders": "`faccel.shard(loader, ctx)`",
    "update_ema": "`faccel.parallel.update_ema(ema, model, ctx)`",
    "wait_for_everyone": "`faccel.barrier(ctx)`",
}

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy(  # pyright: ignore[reportUnsupportedDunderAll]
    __name__, _NAMES, _NAMESPACES, _HINTS
)
