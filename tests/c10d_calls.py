"""Every call of `torch.distributed` that user code can make, as functions of a rank of three.

Each returns plain values. `tests/procs/test_processes.py` compares gloo with a simulated world.
"""

import warnings

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_nn

WORLD_SIZE = 3
R = dist.ReduceOp


def rows(rank, dtype=torch.float32):
    return (torch.arange(1, 7, dtype=torch.float32).view(2, 3) * (rank + 1)).to(dtype)


def plain(value):
    if isinstance(value, torch.Tensor):
        return str(value.dtype), value.detach().to_dense().tolist()
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def all_reduce(op=R.SUM, dtype=torch.float32, **options):
    def call(ctx):
        x = rows(ctx.rank, dtype)
        dist.all_reduce(x, op=op, **options)
        return x

    return call


def reduced_strided(ctx):
    x = rows(ctx.rank)
    dist.all_reduce(x.t())
    return x


def reduced_slice(ctx):
    x = rows(ctx.rank)
    dist.all_reduce(x[:, 1:])
    return x


def sparse(dtype=torch.float32, op=R.SUM):
    def call(ctx):
        indices = [[ctx.rank, 3, 3]]  # not coalesced
        values = torch.tensor([1, 10, 100], dtype=dtype)
        x = torch.sparse_coo_tensor(indices, values, (5,))
        dist.all_reduce(x, op=op)
        return x, x.is_sparse, x.is_coalesced()

    return call


def sparse_rows(ctx):
    x = torch.sparse_coo_tensor([[ctx.rank, 2]], torch.ones(2, 4), (3, 4))
    work = dist.all_reduce(x, async_op=True)
    work.wait()
    return x


def sparse_empty(ctx):
    x = torch.sparse_coo_tensor(torch.zeros(1, 0, dtype=torch.long), torch.zeros(0), (3,))
    if ctx.rank == 1:
        x = torch.sparse_coo_tensor([[2]], torch.ones(1), (3,))
    dist.all_reduce(x)
    return x


def sparse_broadcast(ctx):
    x = torch.sparse_coo_tensor([[ctx.rank]], torch.ones(1), (3,))
    dist.broadcast(x, src=1)
    return x


def sparse_gather(ctx):
    x = torch.sparse_coo_tensor([[ctx.rank]], torch.ones(1), (3,))
    outputs = [torch.zeros(3) for _ in range(WORLD_SIZE)]
    dist.all_gather(outputs, x)
    return outputs


def all_reduce_coalesced(ctx):
    tensors = [rows(ctx.rank), rows(ctx.rank)[0].clone()]
    dist.all_reduce_coalesced(tensors)
    return tensors


def broadcast(dtype=torch.float32):
    def call(ctx):
        x = rows(ctx.rank, dtype)
        dist.broadcast(x, src=1)
        return x

    return call


def broadcast_strided(ctx):
    x = rows(ctx.rank)
    dist.broadcast(x.t(), src=1)
    return x


def broadcast_by_group_rank(ctx):
    x = rows(ctx.rank)
    dist.broadcast(x, group_src=2)
    return x


def reduce(op=R.SUM):
    def call(ctx):
        x = rows(ctx.rank)
        dist.reduce(x, dst=1, op=op)
        # gloo uses the tensor of the other ranks as a buffer
        return x if ctx.rank == 1 else None

    return call


def all_gather(dtype=torch.float32):
    def call(ctx):
        outputs = [torch.zeros(2, 3, dtype=dtype) for _ in range(WORLD_SIZE)]
        dist.all_gather(outputs, rows(ctx.rank, dtype))
        return outputs

    return call


def all_gather_ragged(ctx):
    outputs = [torch.zeros(rank + 1) for rank in range(WORLD_SIZE)]
    dist.all_gather(outputs, torch.ones(ctx.rank + 1))
    return outputs


def all_gather_single(*shape):
    def call(ctx):
        output = torch.zeros(shape)
        dist.all_gather_single(output, rows(ctx.rank))
        return output

    return call


def all_gather_coalesced(ctx):
    outputs = [[torch.zeros(2), torch.zeros(3)] for _ in range(WORLD_SIZE)]
    dist.all_gather_coalesced(outputs, [torch.ones(2) * ctx.rank, torch.ones(3) * ctx.rank])
    return outputs


def gather(ctx):
    outputs = [torch.zeros(2, 3) for _ in range(WORLD_SIZE)]
    dist.gather(rows(ctx.rank), outputs if ctx.rank == 2 else None, dst=2)
    return outputs


def scatter(ctx):
    output = torch.zeros(2, 3)
    dist.scatter(output, [rows(i) for i in range(WORLD_SIZE)] if ctx.rank == 1 else None, src=1)
    return output


def reduce_scatter(op=R.SUM):
    def call(ctx):
        output = torch.zeros(2, 3)
        dist.reduce_scatter(output, [rows(ctx.rank + i) for i in range(WORLD_SIZE)], op=op)
        return output

    return call


def reduce_scatter_single(op=R.SUM, dtype=torch.float32):
    def call(ctx):
        output = torch.zeros(2, 3, dtype=dtype)
        x = torch.cat([rows(ctx.rank + i, dtype) for i in range(WORLD_SIZE)])
        dist.reduce_scatter_single(output, x, op=op)
        return output

    return call


def all_to_all(ctx):
    outputs = [torch.zeros(2, 3) for _ in range(WORLD_SIZE)]
    dist.all_to_all(outputs, [rows(ctx.rank * 10 + i) for i in range(WORLD_SIZE)])
    return outputs


def all_to_all_single(ctx):
    output = torch.zeros(3)
    dist.all_to_all_single(output, torch.arange(3.0) + 10 * ctx.rank)
    return output


def all_to_all_ragged(ctx):
    # rank r sends r + 1 rows to each rank
    x = torch.arange(3.0 * (ctx.rank + 1)) + 100 * ctx.rank
    output = torch.zeros(6)
    dist.all_to_all_single(output, x, [1, 2, 3], [ctx.rank + 1] * 3)
    return output


def all_to_all_empty_rows(ctx):
    # Only to the next rank: an empty list of sizes means "equally many".
    sent, received = [0, 0, 0], [0, 0, 0]
    sent[(ctx.rank + 1) % 3] = 2
    received[(ctx.rank - 1) % 3] = 2
    output = torch.zeros(2)
    dist.all_to_all_single(output, torch.ones(2) * ctx.rank, received, sent)
    return output


def messages(ctx):
    right, left = (ctx.rank + 1) % 3, (ctx.rank - 1) % 3
    x = torch.zeros(2, 3)
    work = dist.isend(rows(ctx.rank), right, tag=4)
    dist.recv(x, left, tag=4)
    work.wait()
    return x


def message_from_any(ctx):
    if ctx.rank:
        dist.send(torch.ones(1) * ctx.rank, 0)
        return None
    total = torch.zeros(1)
    senders = []
    for _ in range(2):
        x = torch.zeros(1)
        senders.append(dist.recv(x))
        total += x
    return total, sorted(senders)


def batched_messages(ctx):
    right, left = (ctx.rank + 1) % 3, (ctx.rank - 1) % 3
    x = torch.zeros(2, 3)
    ops = [dist.P2POp(dist.isend, rows(ctx.rank), right), dist.P2POp(dist.irecv, x, left)]
    for work in dist.batch_isend_irecv(ops):
        work.wait()
    return x


def objects(ctx):
    gathered = [None] * WORLD_SIZE
    dist.all_gather_object(gathered, {"rank": ctx.rank})
    on_one = [None] * WORLD_SIZE if ctx.rank == 1 else None
    dist.gather_object("r" * ctx.rank, on_one, dst=1)
    sent = [ctx.rank, "x"]
    dist.broadcast_object_list(sent, src=2)
    received = [None]
    dist.scatter_object_list(received, ["a", "b", "c"] if ctx.rank == 0 else None, src=0)
    return gathered, on_one, sent, received


def object_messages(ctx):
    if ctx.rank == 0:
        dist.send_object_list(["a", {"b": 1}], dst=1)
    if ctx.rank == 1:
        received = [None, None]
        dist.recv_object_list(received, src=0)
        return received
    return None


def barriers(ctx):
    dist.barrier()
    dist.barrier(async_op=True).wait()
    return "passed"


def monitored_barrier(ctx):
    dist.monitored_barrier()
    return "passed"


def asynchronous(ctx):
    x, y = rows(ctx.rank), rows(ctx.rank)
    first = dist.all_reduce(x, async_op=True)
    second = dist.broadcast(y, 0, async_op=True)
    second.wait()
    first.wait()
    return x, y, first.is_completed()


def future_of_a_work(ctx):
    x = rows(ctx.rank)
    future = dist.all_reduce(x, async_op=True).get_future()
    return future.then(lambda done: done.value()[0] * 2).wait()


def groups(ctx):
    pair = dist.new_group([0, 2])
    x = rows(ctx.rank)
    if ctx.rank != 1:
        dist.all_reduce(x, group=pair)
        dist.broadcast(x, src=2, group=pair)
    facts = [dist.get_rank(pair), dist.get_world_size(), dist.is_initialized()]
    if ctx.rank != 1:
        facts += [dist.get_process_group_ranks(pair), dist.get_global_rank(pair, 1)]
    return x, facts


def sub_groups(ctx):
    own, _ = dist.new_subgroups_by_enumeration([[0, 2], [1]])
    x = rows(ctx.rank)
    dist.all_reduce(x, group=own)
    return x


def outside_of_a_group(ctx):
    x = rows(ctx.rank)
    dist.all_reduce(x, group=dist.new_group([0, 1]))
    return x


def functional(ctx):
    import torch.distributed._functional_collectives as funcol

    x, group = rows(ctx.rank), dist.group.WORLD
    results = [
        funcol.all_reduce(x, "sum", group),
        funcol.all_gather_tensor(x, 0, group),
        funcol.reduce_scatter_tensor(torch.cat([x] * 3), "sum", 0, group),
        funcol.broadcast(x, 1, group),
        funcol.all_to_all_single(torch.arange(3.0), None, None, group),
        *funcol.all_reduce_coalesced([x, x[0].clone()], "sum", group),
        *funcol.all_gather_into_tensor_coalesced([x, x[0].clone()], group),
        *funcol.reduce_scatter_tensor_coalesced([torch.cat([x] * 3)], "sum", [0], group),
    ]
    return [funcol.wait_tensor(result) for result in results]


def differentiable(ctx):
    x = rows(ctx.rank).requires_grad_()
    weights = torch.arange(1.0, 7.0).view(2, 3) * (ctx.rank + 2)
    total = (dist_nn.all_reduce(x * 2) * weights).sum()
    for i, gathered in enumerate(dist_nn.all_gather(x)):
        total = total + (gathered * weights * i).sum()
    total = total + (dist_nn.broadcast(x, 1) * weights).sum()
    swapped = dist_nn.all_to_all_single(torch.zeros(3), x.sum(0))
    (total + (swapped * (ctx.rank + 1)).sum()).backward()
    return x.grad


def differentiable_reduce_scatter(ctx):
    x = rows(ctx.rank).requires_grad_()
    out = dist_nn.reduce_scatter(torch.zeros(2, 3), [x, 2 * x, 3 * x])
    (out * (ctx.rank + 1)).sum().backward()
    return out, x.grad


DTYPES = {
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "int32": torch.int32,
    "int16": torch.int16,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bool": torch.bool,
    "complex64": torch.complex64,
}
OPS = {
    "avg": R.AVG,
    "product": R.PRODUCT,
    "min": R.MIN,
    "max": R.MAX,
    "band": R.BAND,
    "bor": R.BOR,
    "bxor": R.BXOR,
}
CASES = {
    "all_reduce": all_reduce(),
    **{f"all_reduce of {name}": all_reduce(dtype=dtype) for name, dtype in DTYPES.items()},
    **{f"all_reduce with {name}": all_reduce(op) for name, op in OPS.items()},
    **{f"all_reduce of int64 with {name}": all_reduce(op, torch.int64) for name, op in OPS.items()},
    **{f"all_reduce of bool with {name}": all_reduce(op, torch.bool) for name, op in OPS.items()},
    "all_reduce of complex64 with max": all_reduce(R.MAX, torch.complex64),
    "all_reduce of a transposed tensor": reduced_strided,
    "all_reduce of a slice": reduced_slice,
    "all_reduce of a sparse tensor": sparse(),
    "all_reduce of a sparse float64 tensor": sparse(torch.float64),
    "all_reduce of a sparse int64 tensor": sparse(torch.int64),
    "all_reduce of a sparse bfloat16 tensor": sparse(torch.bfloat16),
    "all_reduce of sparse rows": sparse_rows,
    "all_reduce of empty sparse tensors": sparse_empty,
    "all_reduce of a sparse tensor with max": sparse(op=R.MAX),
    "all_reduce of a sparse tensor with avg": sparse(op=R.AVG),
    "broadcast of a sparse tensor": sparse_broadcast,
    "all_gather of a sparse tensor": sparse_gather,
    "all_reduce_coalesced": all_reduce_coalesced,
    "broadcast": broadcast(),
    **{f"broadcast of {name}": broadcast(dtype) for name, dtype in DTYPES.items()},
    "broadcast of a transposed tensor": broadcast_strided,
    "broadcast by the rank of the group": broadcast_by_group_rank,
    "reduce": reduce(),
    **{f"reduce with {name}": reduce(op) for name, op in OPS.items() if op != R.AVG},
    "all_gather": all_gather(),
    "all_gather of bool": all_gather(torch.bool),
    "all_gather of complex64": all_gather(torch.complex64),
    "all_gather of other shapes": all_gather_ragged,
    "all_gather_single, concatenated": all_gather_single(6, 3),
    "all_gather_single, stacked": all_gather_single(3, 2, 3),
    "all_gather_single, too small": all_gather_single(5, 3),
    "all_gather_coalesced": all_gather_coalesced,
    "gather": gather,
    "scatter": scatter,
    "reduce_scatter": reduce_scatter(),
    "reduce_scatter with max": reduce_scatter(R.MAX),
    "reduce_scatter_single": reduce_scatter_single(),
    "reduce_scatter_single with avg": reduce_scatter_single(R.AVG),
    "reduce_scatter_single of bfloat16": reduce_scatter_single(dtype=torch.bfloat16),
    "all_to_all": all_to_all,
    "all_to_all_single": all_to_all_single,
    "all_to_all_single with other sizes": all_to_all_ragged,
    "all_to_all_single with sizes of zero": all_to_all_empty_rows,
    "send and recv": messages,
    "recv from any rank": message_from_any,
    "batch_isend_irecv": batched_messages,
    "objects": objects,
    "send_object_list": object_messages,
    "barrier": barriers,
    "monitored_barrier": monitored_barrier,
    "works": asynchronous,
    "the future of a work": future_of_a_work,
    "groups": groups,
    "new_subgroups": sub_groups,
    "a group without this rank": outside_of_a_group,
    "functional collectives": functional,
    "torch.distributed.nn": differentiable,
    "torch.distributed.nn.reduce_scatter": differentiable_reduce_scatter,
}


def outcome(name, ctx):
    """Return what a case returns on this rank, or the type of its error."""
    try:
        with warnings.catch_warnings():
            # `torch.distributed.nn` and some names of c10d are deprecated, and used a lot.
            warnings.simplefilter("ignore")
            return plain(CASES[name](ctx))
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:90]}"


def all_outcomes(ctx, names):
    """Run the cases one after the other in one world."""
    outcomes = {}
    for name in names:
        outcomes[name] = outcome(name, ctx)
        # A message of the next case must not arrive in this one. Not `dist.barrier`, which raises
        # the errors of earlier calls again.
        dist.all_reduce(torch.zeros(1))
    return outcomes
