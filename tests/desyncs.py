"""Ways in which two ranks can disagree although every tensor has the same shape on both.

Without a comparison of what is communicated each of them returns wrong values, hangs or aborts.
`CASES` are functions of a rank of two. `tests/world/test_desyncs.py` runs them in a simulated world
and in debug mode, where real ranks run all of them one after the other.
"""

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import nn
from torch.distributed.fsdp import fully_shard

import faccel

FSDP = "dp_shard=2"
TP = "tp=2"
DDP = "dp_replicate=2"


class Blocks(nn.Module):
    """Blocks of one shape, which run in the order that a call names."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])

    def forward(self, x, order=(0, 1, 2)):
        for index in order:
            x = self.blocks[index](x)
        return x


def blocks_of(ctx):
    return faccel.wrap(Blocks(), ctx, plan=faccel.Plan(units="Linear"))


def x_of(ctx):
    return torch.ones(2, 4) * (ctx.rank + 1)


def units_in_another_order(ctx):
    blocks_of(ctx)(x_of(ctx), (0, 1, 2) if ctx.rank else (0, 2, 1))


def other_units(ctx):
    blocks_of(ctx)(x_of(ctx), (0, 1) if ctx.rank else (0, 2))


def units_of_fully_shard(ctx):
    model = Blocks()
    for block in model.blocks:
        fully_shard(block, mesh=ctx.mesh.device_mesh)
    fully_shard(model, mesh=ctx.mesh.device_mesh)(x_of(ctx), (1, 0) if ctx.rank else (0, 1))


def models_in_another_order(ctx):
    models = [blocks_of(ctx), blocks_of(ctx)]
    for model in models if ctx.rank else models[::-1]:
        model(x_of(ctx))


def backward_of_another_model(ctx):
    models = [faccel.wrap(nn.Linear(4, 4), ctx) for _ in range(2)]
    losses = [model(x_of(ctx)).sum() for model in models]
    losses[ctx.rank].backward()


def backward_of_another_sharded_model(ctx):
    models = [blocks_of(ctx) for _ in range(2)]
    losses = [model(x_of(ctx)).sum() for model in models]
    losses[ctx.rank].backward()


def tensor_parallel_layers_in_another_order(ctx):
    plan = faccel.Plan(tensor={"blocks.*": "colwise_gather"})
    model = faccel.wrap(Blocks(), ctx, plan=plan)
    model(x_of(ctx), (0, 1, 2) if ctx.rank else (1, 0, 2))


def a_backward_on_one_rank(ctx):
    model = faccel.wrap(nn.Linear(4, 4), ctx)
    loss = model(x_of(ctx)).sum()
    if ctx.rank:
        loss.backward()


def unsynchronized_on_one_rank(ctx):
    model = faccel.wrap(nn.Linear(4, 4), ctx)
    with faccel.grad_sync(model, on=ctx.rank == 0):
        model(x_of(ctx)).sum().backward()


def clipped_on_one_rank(ctx):
    model = blocks_of(ctx)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = faccel.scaled_backward(model(x_of(ctx)).sum(), faccel.init_scaler(ctx), ctx)
    faccel.optimizer_step(opt, scaler, ctx, clip_norm=1.0 if ctx.rank else None)


def full_parameters_on_one_rank(ctx):
    model = blocks_of(ctx)
    if ctx.rank:
        next(model.parameters()).full_tensor()
    else:
        model(x_of(ctx))


def wrapped_in_another_order(ctx):
    if ctx.rank:
        faccel.wrap(nn.Linear(4, 4), ctx)
    else:
        faccel.wrap(nn.Linear(4, 4), ctx)


def crossed_all_reduces(ctx):
    loss, count = torch.ones(1), torch.ones(1)
    if ctx.rank:
        dist.all_reduce(loss)
        dist.all_reduce(count)
    else:
        dist.all_reduce(count)
        dist.all_reduce(loss)


def crossed_all_gathers(ctx):
    a, b, out = torch.ones(2), torch.ones(2), torch.zeros(4)
    if ctx.rank:
        dist.all_gather_single(out, a)
        dist.all_gather_single(out, b)
    else:
        dist.all_gather_single(out, b)
        dist.all_gather_single(out, a)


def crossed_reduce_scatters(ctx):
    out = torch.zeros(2)
    if ctx.rank:
        dist.reduce_scatter_single(out, torch.ones(4))
    else:
        dist.reduce_scatter_single(out, torch.zeros(4))


def crossed_exchanges(ctx):
    out = torch.zeros(2)
    if ctx.rank:
        dist.all_to_all_single(out, torch.ones(2))
    else:
        dist.all_to_all_single(out, torch.zeros(2))


def crossed_functional_sums(ctx):
    group = dist.group.WORLD
    if ctx.rank:
        funcol.all_reduce(torch.ones(2), "sum", group).sum()
    else:
        funcol.all_reduce(torch.zeros(2), "sum", group).sum()


def another_reduction(ctx):
    dist.all_reduce(torch.ones(2), op=dist.ReduceOp.MAX if ctx.rank else dist.ReduceOp.SUM)


def another_source(ctx):
    dist.broadcast(torch.ones(2), src=ctx.rank)


def another_target(ctx):
    dist.reduce(torch.ones(2), dst=ctx.rank)


def another_group(ctx):
    groups = [dist.new_group([0, 1]) for _ in range(2)]
    dist.all_reduce(torch.ones(2), group=groups[ctx.rank])


def another_leaf(ctx):
    faccel.reduce({"loss" if ctx.rank else "accuracy": torch.ones(())}, ctx)


def a_gather_of_another_leaf(ctx):
    faccel.gather({"labels" if ctx.rank else "predictions": torch.ones(3)}, ctx)


def another_operation(ctx):
    faccel.reduce(torch.ones(2), ctx, op="max" if ctx.rank else "min")


def objects_from_another_line(ctx):
    if ctx.rank:
        faccel.gather_objects("loss", ctx)
    else:
        faccel.gather_objects("name", ctx)


def a_reduction_for_a_barrier(ctx):
    if ctx.rank:
        faccel.barrier(ctx)
    else:
        faccel.reduce(torch.ones(2), ctx)


# The mesh on which each case runs.
CASES = {
    units_in_another_order: FSDP,
    other_units: FSDP,
    units_of_fully_shard: FSDP,
    models_in_another_order: FSDP,
    backward_of_another_model: DDP,
    backward_of_another_sharded_model: FSDP,
    tensor_parallel_layers_in_another_order: TP,
    a_backward_on_one_rank: DDP,
    unsynchronized_on_one_rank: DDP,
    clipped_on_one_rank: FSDP,
    full_parameters_on_one_rank: FSDP,
    wrapped_in_another_order: DDP,
    crossed_all_reduces: DDP,
    crossed_all_gathers: DDP,
    crossed_reduce_scatters: DDP,
    crossed_exchanges: DDP,
    crossed_functional_sums: DDP,
    another_reduction: DDP,
    another_source: DDP,
    another_target: DDP,
    another_group: DDP,
    another_leaf: DDP,
    a_gather_of_another_leaf: DDP,
    another_operation: DDP,
    objects_from_another_line: DDP,
    a_reduction_for_a_barrier: DDP,
}


def run(ctx, case):
    """Run a case; a rank that makes fewer calls than the other meets it in the barrier."""
    case(ctx)
    faccel.barrier(ctx)


def run_all(ctx, cases):
    """Run the cases in one world of real ranks; return the error of this rank for each."""
    errors = {}
    for case in cases:
        try:
            run(ctx, case)
        except faccel.errors.DesyncError as error:
            errors[case.__name__] = error.got
    return errors
