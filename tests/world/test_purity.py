"""Each function changes what its label names and nothing else, by value, on two ranks."""

import os
import random
import tempfile

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import faccel
from faccel.parallel import diloco, ema_weights, init_diloco, init_ema, update_ema
from faccel.testing import simulate


def ambient():
    """Return all state of the process that a function could change."""
    return {
        "torch": torch.get_rng_state().tolist(),
        "numpy": str(np.random.get_state()),
        "python": random.getstate(),
        "environment": dict(os.environ),
        "dtype": torch.get_default_dtype(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "gradients": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
    }


def values(objects):
    """Return copies of the contents of models, optimizers and tensors."""
    copies = {}
    for name, value in objects.items():
        if isinstance(value, torch.Tensor):
            copies[name] = value.detach().clone()
        elif isinstance(value, nn.Module):
            copies[name] = {k: v.detach().clone() for k, v in value.state_dict().items()}
            copies[f"{name}.grad"] = [
                None if p.grad is None else p.grad.clone() for p in value.parameters()
            ]
        elif isinstance(value, torch.optim.Optimizer):
            copies[name] = repr(value.state_dict())
    return copies


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def scene(ctx):
    """Return one argument of each kind."""
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout(0.5))
    model = faccel.wrap(net, ctx)
    opt = torch.optim.Adam(model.parameters(), lr=0.1)
    x = torch.full((2, 2), ctx.rank + 1.0)
    loader = faccel.shard(DataLoader(TensorDataset(torch.ones(6, 2)), 2, shuffle=True), ctx)
    raw = nn.Linear(2, 2)
    with torch.no_grad():
        raw.weight.fill_(1.0), raw.bias.fill_(1.0)
    return {
        "net": net,
        "model": model,
        "raw": raw,
        "opt": opt,
        "x": x,
        "loader": loader,
        "scaler": faccel.init_scaler(ctx),
    }


def backward(s, ctx):
    return faccel.scaled_backward(s["model"](s["x"]).sum(), s["scaler"], ctx)


# name -> what to call, and which things of the scene it may change
BUDGET = {"cpu": "1GB"}
HEADS = torch.ones(1, 2, 4, 2)
CALLS = {
    "attention": (
        lambda s, ctx: faccel.parallel.attention(HEADS, HEADS, HEADS, ctx, is_causal=True),
        set(),
    ),
    "averaged": (lambda s, ctx: faccel.parallel.averaged({"x": s["x"]}, ctx), set()),
    "context_parallel": (lambda s, ctx: faccel.parallel.context_parallel(ctx), set()),
    "local_sgd": (
        lambda s, ctx: faccel.parallel.local_sgd(s["model"], ctx, step=1, every=2),
        set(),
    ),
    "cross_entropy": (
        lambda s, ctx: faccel.parallel.cross_entropy(s["x"], torch.ones(2).long(), ctx),
        set(),
    ),
    "loss_parallel": (lambda s, ctx: faccel.parallel.loss_parallel(ctx), set()),
    "plan_for": (lambda s, ctx: faccel.parallel.plan_for(s["net"], ctx), set()),
    "split_sequence": (lambda s, ctx: faccel.parallel.split_sequence(s["x"], ctx), set()),
    "place": (lambda s, ctx: exported_and_placed(s, ctx), set()),
    "load_quantized": (lambda s, ctx: exported_and_quantized(s, ctx), set()),
    "placement_for": (lambda s, ctx: faccel.inference.placement_for(s["net"], BUDGET), set()),
    "materialize": (lambda s, ctx: faccel.inference.materialize(offloaded(s, ctx)), set()),
    "offload": (lambda s, ctx: offloaded(s, ctx), set()),
    "on_meta": (lambda s, ctx: entered(faccel.inference.on_meta()), set()),
    "share_work": (lambda s, ctx: faccel.inference.share_work(list, [1, 2], ctx), set()),
    "agree": (lambda s, ctx: faccel.agree(ctx, a=True), set()),
    "autocast": (lambda s, ctx: faccel.autocast(ctx), set()),
    "barrier": (lambda s, ctx: faccel.barrier(ctx), set()),
    "broadcast": (lambda s, ctx: faccel.broadcast(s["x"], ctx), set()),
    "broadcast_objects": (lambda s, ctx: faccel.broadcast_objects([s["x"]], ctx), set()),
    "generator": (lambda s, ctx: torch.rand(2, generator=faccel.random.generator(0, 1)), set()),
    "gather": (lambda s, ctx: faccel.gather(s["x"], ctx, num_valid=1), set()),
    "gather_objects": (lambda s, ctx: faccel.gather_objects(s["x"], ctx), set()),
    "init_scaler": (lambda s, ctx: faccel.init_scaler(ctx), set()),
    "on_main": (lambda s, ctx: faccel.on_main(ctx)(lambda: 1)(), set()),
    "num_recompilations": (lambda s, ctx: faccel.parallel.num_recompilations(), set()),
    "on_local_main": (lambda s, ctx: faccel.comm.on_local_main(ctx)(lambda: 1)(), set()),
    "on_rank": (lambda s, ctx: faccel.on_rank(1, ctx)(lambda: 1)(), set()),
    "split": (lambda s, ctx: faccel.split(s["x"], ctx, pad=True), set()),
    "pad_across": (lambda s, ctx: faccel.comm.pad_across(s["x"], ctx), set()),
    "all_to_all": (lambda s, ctx: faccel.comm.all_to_all(s["x"], ctx), set()),
    "scatter_objects": (lambda s, ctx: faccel.comm.scatter_objects([1, 2], ctx), set()),
    "reduce": (lambda s, ctx: faccel.reduce(s["x"], ctx, op="mean"), set()),
    "shard": (lambda s, ctx: faccel.shard(DataLoader(range(4), 2), ctx), set()),
    "unwrap": (lambda s, ctx: faccel.unwrap(s["model"]), set()),
    "wrap_optimizer": (lambda s, ctx: faccel.wrap_optimizer(s["opt"], s["model"], ctx), set()),
    "batches": (lambda s, ctx: list(faccel.batches(s["loader"].at(0))), set()),
    "windows": (
        lambda s, ctx: [list(w) for w in faccel.windows(s["loader"].at(0), ctx, weight=len_of)],
        set(),
    ),
    "grad_sync": (lambda s, ctx: faccel.grad_sync(s["model"], on=False).__enter__(), set()),
    "wrap": (lambda s, ctx: faccel.wrap(s["raw"], ctx), set()),  # rank 0's values are there already
    "rewrap": (lambda s, ctx: faccel.rewrap(s["model"], ctx), set()),  # the same
    "save": (lambda s, ctx: faccel.save(dict(s, loader=0), folder(ctx), ctx, step=1), set()),
    "load": (lambda s, ctx: saved_and_loaded(s, ctx), set()),  # the same values
    "export_model": (
        lambda s, ctx: faccel.checkpoint.export_model(s["model"], folder(ctx), ctx),
        set(),
    ),
    "load_model": (lambda s, ctx: exported_and_loaded(s, ctx), set()),
    "save_object": (
        lambda s, ctx: faccel.checkpoint.save_object(s["x"], f"{folder(ctx)}/x.pt", ctx),
        set(),
    ),
    "latest": (lambda s, ctx: faccel.latest(folder(ctx), ctx), set()),
    "checkpoints": (lambda s, ctx: faccel.checkpoint.checkpoints("."), set()),
    "every_steps": (
        lambda s, ctx: faccel.checkpoint.every_steps(2)(faccel.checkpoint.SaveEvent(1)),
        set(),
    ),
    "every_seconds": (
        lambda s, ctx: faccel.checkpoint.every_seconds(2)(faccel.checkpoint.SaveEvent(1)),
        set(),
    ),
    "at_best": (lambda s, ctx: faccel.checkpoint.at_best()(faccel.checkpoint.SaveEvent(1)), set()),
    "on_preemption": (
        lambda s, ctx: faccel.checkpoint.on_preemption()(faccel.checkpoint.SaveEvent(1)),
        set(),
    ),
    "keep_latest": (lambda s, ctx: faccel.checkpoint.keep_latest(2)([]), set()),
    "keep_best": (lambda s, ctx: faccel.checkpoint.keep_best(2, "loss")([]), set()),
    "keep_every": (lambda s, ctx: faccel.checkpoint.keep_every(2)([]), set()),
    "print": (lambda s, ctx: faccel.print(end="", ctx=ctx), set()),
    "per_rank": (lambda s, ctx: faccel.checkpoint.per_rank(s["x"]), set()),
    "full_state_dict": (lambda s, ctx: faccel.parallel.full_state_dict(s["model"], ctx), set()),
    "gathered": (lambda s, ctx: entered(faccel.parallel.gathered(s["model"], ctx)), set()),
    "init_diloco": (lambda s, ctx: init_diloco(s["model"], ctx, every=2), set()),
    "diloco": (
        lambda s, ctx: diloco(init_diloco(s["model"], ctx, every=2), s["model"], ctx, step=1),
        set(),
    ),
    "init_meter": (lambda s, ctx: faccel.tracking.init_meter(ctx), set()),
    "tick": (lambda s, ctx: faccel.tracking.tick(faccel.tracking.init_meter(ctx)), set()),
    "rates": (lambda s, ctx: faccel.tracking.rates(faccel.tracking.init_meter(ctx), ctx), set()),
    "peak_memory": (lambda s, ctx: faccel.tracking.peak_memory(s, ctx), set()),
    "phase": (lambda s, ctx: entered(faccel.tracking.phase("evaluation", ctx)), set()),
    "flops_of": (lambda s, ctx: faccel.tracking.flops_of(s["net"].eval(), s["x"]), set()),
    "empty_cache": (lambda s, ctx: faccel.parallel.empty_cache(ctx), set()),
    "free_memory": (lambda s, ctx: faccel.parallel.free_memory(ctx), set()),
    "init_ema": (lambda s, ctx: init_ema(s["model"], ctx), set()),
    "update_ema": (
        lambda s, ctx: update_ema(init_ema(s["model"], ctx), s["model"], ctx),
        set(),
    ),
    "ema_weights": (
        lambda s, ctx: entered(ema_weights(s["model"], init_ema(s["model"], ctx), ctx)),
        set(),
    ),
}


def entered(context):
    with context:
        pass


def folder(ctx):
    return faccel.broadcast_objects([tempfile.mkdtemp()] if ctx.is_main else [], ctx)[0]


def saved_and_loaded(s, ctx):
    path, state = folder(ctx), {name: s[name] for name in ("net", "model", "opt", "x", "scaler")}
    faccel.save(state, path, ctx, step=1)
    faccel.load(state, path, ctx)


def exported_and_loaded(s, ctx):
    path = folder(ctx)
    faccel.checkpoint.export_model(s["model"], path, ctx)
    faccel.checkpoint.load_model(s["model"], path, ctx)


def exported_and_placed(s, ctx):
    path = folder(ctx)
    faccel.checkpoint.export_model(s["raw"], path, ctx)
    faccel.inference.place(s["raw"], path, ctx, budget=BUDGET)


def exported_and_quantized(s, ctx):
    path = folder(ctx)
    net = nn.Sequential(torch.nn.utils.skip_init(nn.Linear, 64, 64))  # draws no numbers
    nn.init.ones_(net[0].weight), nn.init.ones_(net[0].bias)
    faccel.checkpoint.export_model(net, path, ctx)
    faccel.inference.load_quantized(net, path, ctx)


def offloaded(s, ctx):
    return faccel.inference.offload(s["raw"], "disk", ctx, folder=folder(ctx))


def len_of(batch):
    return batch.num_valid


@pytest.mark.parametrize("name", CALLS)
def test_a_function_changes_only_what_its_label_names(name):
    call, may_change = CALLS[name]

    def fn(ctx):
        s = scene(ctx)
        before, around = values(s), ambient()
        call(s, ctx)
        after = values(s)
        assert {k for k in before if not equal(before[k], after[k])} <= may_change
        assert ambient() == around

    simulate(fn, 2)


def test_backward_changes_gradients_alone():
    def fn(ctx):
        s = scene(ctx)
        s["model"].eval()  # batch norm's statistics and dropout are the model's own doing
        before, around = values(s), ambient()
        backward(s, ctx)
        after = values(s)
        assert {k for k in before if not equal(before[k], after[k])} == {"net.grad"}
        assert ambient() == around

    simulate(fn, 2)


def test_a_step_changes_parameters_optimizer_and_gradients_alone():
    def fn(ctx):
        s = scene(ctx)
        other = scene(ctx)
        scaler = backward(s, ctx)
        before, around = (
            values({"x": s["x"], "other": other["net"], "others_opt": other["opt"]}),
            ambient(),
        )
        weights = values(s)
        faccel.optimizer_step(s["opt"], scaler, ctx, clip_norm=1.0)
        assert equal(
            values({"x": s["x"], "other": other["net"], "others_opt": other["opt"]}), before
        )
        changed = {k for k, v in values(s).items() if not equal(v, weights[k])}
        assert changed == {"net", "net.grad", "opt"}
        assert ambient() == around

    simulate(fn, 2)


def test_every_function_without_effects_on_its_arguments_is_covered():
    covered = set(CALLS) | {"scaled_backward", "optimizer_step"}
    elsewhere = {
        *(
            "init",
            "shutdown",
            "main_first",
            "preemption",
            "launch",
            "notebook_launch",
        ),  # process state is what they are for
        "join",  # test_join.py compares what it leaves with a reference
        "step_in_backward",  # test_in_backward.py compares it with steps after backward
        *("unscale", "grad_norm"),  # test_unscale.py compares gradients before and after
        "push_to_hub",  # takes no values; tests/hf/test_hub.py
        "forward_backward",  # test_forward_backward.py compares it with a loop by hand
        *("goodput", "read_journal"),  # take no values; test_goodput.py
        "find_batch_size",  # test_failures.py compares it with the limits of the ranks
        *("seed_everything", "rng_state", "set_rng_state"),
        "profile",  # test_profiler.py: a process can profile one rank
        *("get_logger", "progress", "show", "init_trackers", "log", "finish", "handle"),
        *("log_images", "log_table", "log_figure", "log_file"),
    }
    namespaces = (
        faccel,
        faccel.checkpoint,
        faccel.comm,
        faccel.inference,
        faccel.parallel,
        faccel.random,
        faccel.tracking,
    )
    public = {
        name: getattr(namespace, name) for namespace in namespaces for name in namespace.__all__
    }
    functions = {name for name, value in public.items() if not isinstance(value, type)}
    assert functions == covered | elsewhere
