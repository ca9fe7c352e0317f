"""Random programs of collectives over the axes of a mesh, with the value of every call.

The values come from lists of Python numbers and from the coordinates of the ranks, which are
computed here. A program may have one fault: a rank that raises, leaves, leaves a call out, makes
another call or two calls in the other order.
"""

import itertools
import math

import torch

import faccel

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")  # slowest first
MESHES = (
    *({"dp_replicate": 2}, {"dp_replicate": 3}, {"dp_replicate": 4}, {"dp_shard": 2}, {"tp": 2}),
    *({"dp_replicate": 2, "dp_shard": 2}, {"dp_shard": 2, "tp": 2}, {"dp_replicate": 2, "tp": 3}),
    *({"dp_replicate": 2, "dp_shard": 2, "tp": 2}, {"dp_shard": 4}, {"dp_shard": 2, "cp": 2}),
)
CALLS = (
    *("gather", "sum", "max", "min", "mean", "prod", "broadcast", "barrier", "agree"),
    *("gather_objects", "broadcast_objects", "scatter_objects", "all_to_all", "pad_across"),
)
OTHER_CALLS = ("another call", "another shape", "another axis")
FAULTS = ("raises", "leaves", "leaves out", "order", *OTHER_CALLS)


class PlannedError(Exception):
    """The error of the rank that a program lets fail."""


def world_size_of(mesh):
    return math.prod(mesh.values())


def coordinates(mesh):
    """Return the coordinates of each rank; the last axis varies fastest."""
    extents = [range(mesh.get(axis, 1)) for axis in AXES]
    return [dict(zip(AXES, place, strict=True)) for place in itertools.product(*extents)]


def peers(mesh, rank, axis):
    """Return the ranks of the axis that contain `rank`."""
    varying = {"world": AXES, "data": ("dp_replicate", "dp_shard")}.get(axis, (axis,))
    places = coordinates(mesh)
    fixed = [name for name in AXES if name not in varying]
    return [
        other
        for other, place in enumerate(places)
        if all(place[name] == places[rank][name] for name in fixed)
    ]


def numbers(rank, step, count):
    """Return the numbers that a rank sends: small, so that sums and products are exact."""
    return [float((rank * 3 + step * 5 + index) % 7 - 2) for index in range(count)]


def run_call(ctx, call, size):
    """Make a call; return its result as lists of Python values."""
    step, name, axis, count, src = call
    x = torch.tensor(numbers(ctx.rank, step, count))
    if name in ("sum", "max", "min", "mean", "prod"):
        return faccel.reduce({"x": x}, ctx, op=name, axis=axis)["x"].tolist()
    if name == "agree":
        return faccel.agree(ctx, axis=axis, stop=x[0].item() > 2)["stop"]
    if name == "all_to_all":
        rows = torch.tensor([numbers(ctx.rank, step + row, count) for row in range(size)])
        return faccel.comm.all_to_all(rows, ctx, axis=axis).tolist()
    if name == "scatter_objects":
        items = [(step, ctx.rank, index) for index in range(size)]
        return faccel.comm.scatter_objects(items, ctx, src=src % size, axis=axis)
    simple = {
        "gather": lambda: faccel.gather([x], ctx, axis=axis)[0].tolist(),
        "broadcast": lambda: faccel.broadcast(x, ctx, src=src % size, axis=axis).tolist(),
        "barrier": lambda: faccel.barrier(ctx, axis=axis),
        "gather_objects": lambda: faccel.gather_objects((ctx.rank, step), ctx, axis=axis),
        "broadcast_objects": lambda: faccel.broadcast_objects(
            [ctx.rank, step], ctx, src=src % size, axis=axis
        ),
        "pad_across": lambda: faccel.comm.pad_across(
            torch.ones(1 + ctx.rank % 3), ctx, axis=axis
        ).tolist(),
    }
    return simple[name]()


def reduced(name, columns):
    fold = {"sum": sum, "max": max, "min": min, "prod": math.prod}
    if name == "mean":
        return [sum(column) / len(column) for column in columns]
    return [fold[name](column) for column in columns]


def value_of(mesh, call, rank):
    """Return the value that a call must have on a rank."""
    step, name, axis, count, src = call
    group = peers(mesh, rank, axis)
    index, source = group.index(rank), group[src % len(group)]
    sent = {other: numbers(other, step, count) for other in group}
    if name in ("sum", "max", "min", "mean", "prod"):
        return reduced(name, list(zip(*sent.values(), strict=True)))
    if name == "pad_across":
        longest = max(1 + other % 3 for other in group)
        return [1.0] * (1 + rank % 3) + [0.0] * (longest - 1 - rank % 3)
    simple = {
        "gather": lambda: [number for other in group for number in sent[other]],
        "broadcast": lambda: sent[source],
        "barrier": lambda: None,
        "agree": lambda: any(sent[other][0] > 2 for other in group),
        "gather_objects": lambda: [(other, step) for other in group],
        "broadcast_objects": lambda: [source, step],
        "scatter_objects": lambda: (step, source, index),
        "all_to_all": lambda: [numbers(other, step + index, count) for other in group],
    }
    return simple[name]()


def is_same(value, expected, name):
    if name != "mean":
        return value == expected
    return all(abs(x - y) < 1e-6 for x, y in zip(value, expected, strict=True))


def draw_program(draw, meshes=MESHES, length=8, faults=FAULTS):
    """Return a mesh, its calls, and a fault: None, or the kind, the rank and the step."""
    mesh = draw.choice(meshes)
    axes = ["world", "data", *mesh]
    calls = []
    for step in range(draw.randrange(1, length + 1)):
        count = draw.choice([1, 2, 5])
        calls.append((step, draw.choice(CALLS), draw.choice(axes), count, draw.randrange(4)))
    fault = None
    if faults and draw.random() < 0.7:
        rank = draw.randrange(world_size_of(mesh))
        fault = (draw.choice(faults), rank, draw.randrange(len(calls)))
    return mesh, calls, fault


def changed(call, kind, mesh):
    """Return the other call that a rank with a fault makes."""
    step, name, axis, count, src = call
    if kind == "another call":
        return step, CALLS[(CALLS.index(name) + 1) % len(CALLS)], axis, count, src
    if kind == "another shape":
        return step, name, axis, count + 1, src
    return step, name, "world" if axis != "world" else next(iter(mesh)), count, src


def calls_of(mesh, calls, fault, rank):
    """Return the calls of a rank; PlannedError and None stand for raising and leaving."""
    if fault is None or fault[1] != rank:
        return calls
    kind, _, step = fault
    before, after = calls[:step], calls[step + 1 :]
    if kind == "raises":
        return [*before, PlannedError]
    if kind == "leaves":
        return before
    if kind == "leaves out":
        return before + after
    if kind == "order":
        return [*before, *after[:1], calls[step], *after[1:]]
    return [*before, changed(calls[step], kind, mesh), *after]


def run(ctx, mesh, calls, fault, values):
    """Run a program on a rank; append the value of each call to `values`."""
    for call in calls_of(mesh, calls, fault, ctx.rank):
        if call is PlannedError:
            raise PlannedError(f"planned on rank {ctx.rank}")
        size = len(peers(mesh, ctx.rank, call[2]))
        values.append((call[0], run_call(ctx, call, size)))


def is_unknown(calls, fault, rank, step):
    """Return whether the value of a call is not that of the program, although no rank raised."""
    if fault is None:
        return False
    kind, fault_rank, fault_step = fault
    if kind == "order":
        # Two calls of one kind in the other order look equal to all ranks.
        pair = calls[fault_step : fault_step + 2]
        return step in (fault_step, fault_step + 1) and pair[0][1:3] == pair[-1][1:3]
    # A call that the other ranks of its group do not make.
    return kind in OTHER_CALLS and (fault_rank, fault_step) == (rank, step)


def wrong_values(mesh, calls, fault, values, *, is_complete):
    """Return the values that differ from what they must be.

    After the fault, ranks may meet in a later call that looks equal, until the run raises: if it
    does, only the values before the fault are compared.
    """
    wrong = []
    for rank, rank_values in enumerate(values):
        for step, value in rank_values:
            if not is_complete and step >= fault[2]:
                continue
            if is_unknown(calls, fault, rank, step):
                continue
            name = calls[step][1]
            expected = value_of(mesh, calls[step], rank)
            if not is_same(value, expected, name):
                wrong.append(f"rank {rank}, {calls[step]}: {value}, not {expected}")
    return wrong
