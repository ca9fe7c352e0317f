"""Checkpoints and exports: when to save, what to keep, what is on disk."""

from __future__ import annotations

from typing import TYPE_CHECKING

from faccel.exports import lazy

if TYPE_CHECKING:
    from faccel.checkpoint.codec_per_rank import per_rank as per_rank
    from faccel.checkpoint.export import export_model as export_model
    from faccel.checkpoint.hub import push_to_hub as push_to_hub
    from faccel.checkpoint.load_weights import load_model as load_model
    from faccel.checkpoint.manifest import Checkpoint as Checkpoint
    from faccel.checkpoint.manifest import checkpoints as checkpoints
    from faccel.checkpoint.pickled import save_object as save_object
    from faccel.checkpoint.policy import KeepPolicy as KeepPolicy
    from faccel.checkpoint.policy import SaveEvent as SaveEvent
    from faccel.checkpoint.policy import SavePolicy as SavePolicy
    from faccel.checkpoint.policy import at_best as at_best
    from faccel.checkpoint.policy import every_seconds as every_seconds
    from faccel.checkpoint.policy import every_steps as every_steps
    from faccel.checkpoint.policy import keep_best as keep_best
    from faccel.checkpoint.policy import keep_every as keep_every
    from faccel.checkpoint.policy import keep_latest as keep_latest
    from faccel.checkpoint.policy import on_preemption as on_preemption
    from faccel.checkpoint.preemption import Preemption as Preemption

_NAMES = {
    "faccel.checkpoint.codec_per_rank": ("per_rank",),
    "faccel.checkpoint.export": ("export_model",),
    "faccel.checkpoint.hub": ("push_to_hub",),
    "faccel.checkpoint.load_weights": ("load_model",),
    "faccel.checkpoint.manifest": ("Checkpoint", "checkpoints"),
    "faccel.checkpoint.policy": (
        "KeepPolicy", "SaveEvent", "SavePolicy", "at_best", "every_seconds", "every_steps",
        "keep_best", "keep_every", "keep_latest", "on_preemption",
    ),
    "faccel.checkpoint.pickled": ("save_object",),
    "faccel.checkpoint.preemption": ("Preemption",),
}  # fmt: skip
__getattr__, __dir__, __all__ = lazy(  # pyright: ignore[reportUnsupportedDunderAll]
    __name__, _NAMES
)
