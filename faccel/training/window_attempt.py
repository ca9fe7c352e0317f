"""The state before a window, to which a failed attempt returns, and its smaller micro-batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import attrs
import torch

from faccel.context import DistContext
from faccel.data.batch import Batch
from faccel.data.batch_split import split_batch
from faccel.random.seeding import RngState, rng_state, set_rng_state
from faccel.training.model import WrappedModel
from faccel.training.windows import MicroBatch, Window
from faccel.tree import flatten


@attrs.frozen(eq=False)
class WindowStart:
    """What an attempt changes: random numbers, buffers and gradients.

    Args:
        rng: The process-wide generators before the window.
        buffers: Each buffer of all models, and a copy of it.
        models: The model, and the others without gradients, which a loss may reach as well.
        has_gradients: Whether gradients of another backward would be lost.
    """

    rng: RngState
    buffers: list[tuple[torch.Tensor, torch.Tensor]]
    models: list[WrappedModel]
    has_gradients: bool

    @classmethod
    def of(cls, model: WrappedModel, ctx: DistContext) -> WindowStart:
        """Return the state before a window; copies the buffers of all models of `ctx`."""
        buffers: list[tuple[torch.Tensor, torch.Tensor]] = []
        models = [model]
        for other in ctx.lifetime.models():
            assert isinstance(other, WrappedModel)
            buffers.extend((buffer, buffer.clone()) for buffer in other.module.buffers())
            # Gradients that exist are of another backward: a loop sets them to None before it
            # uses those of this window, as for the discriminator of a GAN.
            if other is not model and not _has_gradients(other):
                models.append(other)
        # `zero_grad` drops the gradients of a backward, and another model has none here.
        has_gradients = ctx.lifetime.num_backwards > 0 and _has_gradients(model)
        return cls(rng_state(ctx), buffers, models, has_gradients)

    def restore(self) -> None:
        """Return to this state. Updates the generators and the buffers."""
        set_rng_state(self.rng)
        with torch.no_grad():
            for buffer, copy in self.buffers:
                buffer.copy_(copy)


def _has_gradients(model: WrappedModel) -> bool:
    # A gradient that FSDP2 has not reduced has a placeholder in `.grad`.
    return any(param.grad is not None for param in model.module.parameters())


def drop_gradients(models: Iterable[object], ctx: DistContext) -> None:
    """Drop the gradients of wrapped models, and what an unfinished backward left. Not collective.

    Effects: updates models.
    """
    for model in models:
        ctx.lifetime.reducer_of(model).discard()
    ctx.lifetime.drop_backwards()


def num_rows_of(batch: Batch) -> int:
    """Return the number of rows of a batch, 0 if it has no tensors with rows.

    Effects: pure.
    """
    for leaf in flatten(batch.data)[0]:
        if isinstance(leaf, torch.Tensor) and leaf.ndim > 0:
            return len(leaf)
    return 0


def micro_batches(window: Window, max_rows: int | None) -> Iterable[MicroBatch]:
    """Return the micro-batches of a window, cut into smaller ones of at most `max_rows` rows.

    The gradient stays the same. Without a `weight` the loss is a mean over rows, so the factor of
    a micro-batch is divided between the smaller ones in proportion to their rows.
    """
    if max_rows is None:
        return window
    return _split(window, max_rows)


def _split(window: Window, max_rows: int) -> Iterator[MicroBatch]:
    for micro, batch in zip(window, window.batches, strict=True):
        num_rows = num_rows_of(batch)
        splits = split_batch(batch, max(1, -(-num_rows // max_rows)), is_mean=False)
        for index, split in enumerate(splits):
            scale = micro.scale
            if window.is_mean and len(splits) > 1:
                scale = scale * num_rows_of(split) / num_rows
            is_last = index == len(splits) - 1
            yield MicroBatch(split.data, split.num_valid, scale, micro.sync and is_last)
