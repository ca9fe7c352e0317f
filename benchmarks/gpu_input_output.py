"""Measurements of `benchmarks/gpu.py` that read or write data: checkpoints and loaders."""

import contextlib
import dataclasses
import itertools
import os
import shutil
import tempfile
from pathlib import Path

import torch
from gpu_contenders import Setup, accelerator_of, adamw, context, synchronize
from gpu_model import gpt
from measure import alternate
from torch.utils.data import DataLoader, Dataset

import faccel


def pinned(tensor):
    """Return an empty tensor in memory of the host, pinned where there is a device."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type != "cpu")


def copies_on_host(tensors, device):
    """Copy tensors to the host, as fast as PyTorch can, and wait for the copies."""
    copies = []
    for tensor in tensors:
        copy = pinned(tensor)
        copy.copy_(tensor, non_blocking=True)
        copies.append(copy)
    synchronize(device)
    return copies


def raw_write(copies, path):
    with open(path, "wb", buffering=0) as file:
        for copy in copies:
            data = memoryview(copy.reshape(-1).view(torch.uint8).numpy())
            for start in range(0, len(data), 1 << 22):
                file.write(data[start : start + (1 << 22)])
        os.fsync(file.fileno())


@contextlib.contextmanager
def saved_state(device, size):
    """Yield a context, a model and its optimizer states, their tensors, and a folder."""
    with contextlib.ExitStack() as stack:
        folder = tempfile.mkdtemp(dir=os.environ.get("BENCHMARK_DIR"))
        stack.callback(shutil.rmtree, folder)
        ctx = context(Setup(device, size), stack)  # closed first: it waits for background saves
        saved_size = dataclasses.replace(size, width=size.saved_width)
        model = faccel.wrap(gpt(saved_size), ctx)
        opt = faccel.wrap_optimizer(adamw(model), model, ctx)
        tensors = list(model.parameters())
        scaler = faccel.scaled_backward(
            sum(param.sum() for param in tensors), faccel.init_scaler(ctx), ctx
        )
        faccel.optimizer_step(opt, scaler, ctx)
        for state in opt.state.values():
            tensors += [state["exp_avg"], state["exp_avg_sq"]]
        yield ctx, {"model": model, "opt": opt}, [t.detach() for t in tensors], Path(folder)


def seconds_of_saves(device, size, *, background):
    """Return the seconds of each round of the raw copy, or of the raw write, and of `save`."""
    with saved_state(device, size) as (ctx, state, tensors, folder):
        steps = itertools.count(1)
        copies = []

        def raw():
            copies.extend(copies_on_host(tensors, device))
            if not background:
                raw_write(copies, folder / "raw")

        def save():
            faccel.save(
                state, folder / "runs", ctx, step=next(steps), keep=1, background=background
            )

        def clean():
            copies.clear()
            faccel.latest(folder / "runs", ctx)  # waits for a background save
            (folder / "raw").unlink(missing_ok=True)
            os.sync()
            synchronize(device)

        return alternate({"raw": raw, "faccel": save}, min(size.rounds, 5), before=clean)


class Images(Dataset):
    """Pictures of bytes that are converted one by one, as a loader of files does."""

    def __init__(self, size):
        generator = torch.Generator().manual_seed(0)
        # One picture: each worker gets a copy of the dataset.
        self.image = torch.randint(256, size.item_shape, dtype=torch.uint8, generator=generator)
        self.num_items = size.num_items

    def __len__(self):
        return self.num_items

    def __getitem__(self, index):
        return (self.image + index % 256).float().div_(255), index


def seconds_of_loading(device, size, num_workers):
    """Return the seconds of an epoch of each contender, from the dataset to the device."""
    is_pinned = device.type != "cpu"
    options = {"num_workers": num_workers, "pin_memory": is_pinned}
    if num_workers:
        options |= {"persistent_workers": True, "multiprocessing_context": "forkserver"}
    dataset = Images(size)

    def loader():
        return DataLoader(dataset, 64, shuffle=True, **options)

    def read(batches):
        count = 0
        for x, _ in batches:
            assert x.device.type == device.type
            count += len(x)
        synchronize(device)
        assert count == size.num_items

    plain = loader()

    def raw():
        read([t.to(device, non_blocking=True) for t in batch] for batch in plain)

    with contextlib.ExitStack() as stack:
        ctx = context(Setup(device, size), stack)
        sharded = faccel.shard(loader(), ctx)
        epochs = itertools.count()
        contenders = {"torch": raw, "faccel": lambda: read(sharded.at(next(epochs)))}
        with contextlib.suppress(ImportError):
            prepared = accelerator_of(Setup(device, size)).prepare(loader())
            contenders["accelerate"] = lambda: read(prepared)
        return alternate(contenders, min(size.rounds, 5), warmup=1)
