"""Time to gather a dict of 20 small tensors from 2 gloo processes.

`faccel.gather`, `accelerate.utils.gather`, `Fabric.all_gather`, and PyTorch's collective once per
tensor, all on the same process group and in one launch.

torchrun --nproc-per-node 2 benchmarks/gather.py
"""

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import gather as accelerate_gather
from lightning_fabric import Fabric
from measure import alternate, ratios, report, spread, table, target

import faccel

NUM_LEAVES = 20
SHAPE = (32, 8)
CALLS = 20  # per round and contender
ROUNDS = 40

# torch 2.13 renamed the function and warns about the old name
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def torch_gather(tree):
    gathered = {}
    for name, leaf in tree.items():
        gathered[name] = leaf.new_empty(dist.get_world_size() * leaf.shape[0], *leaf.shape[1:])
        all_gather_single(gathered[name], leaf)
    return gathered


def repeat(gather, tree):
    def run():
        for _ in range(CALLS):
            gather(tree)

    return run


def main(ctx):
    Accelerator(cpu=True)  # uses the process group that faccel.init created; so does Fabric
    fabric = Fabric(accelerator="cpu", devices=ctx.world_size, strategy="ddp")
    fabric.launch()
    tree = {f"leaf_{i:02}": torch.full(SHAPE, 100.0 * i + ctx.rank) for i in range(NUM_LEAVES)}
    gathers = {
        "torch, once per tensor": torch_gather,
        "faccel": lambda tree: faccel.gather(tree, ctx),
        "accelerate": accelerate_gather,
        "fabric": fabric.all_gather,
    }
    for name, gather in gathers.items():
        for i, value in enumerate(gather(tree).values()):
            expected = torch.stack(
                [torch.full(SHAPE, 100.0 * i + rank) for rank in range(ctx.world_size)]
            )
            # Fabric returns a separate dimension for the ranks, the others concatenate.
            assert torch.equal(value.reshape(expected.shape), expected), (name, i)

    contenders = {name: repeat(gather, tree) for name, gather in gathers.items()}
    seconds = alternate(contenders, ROUNDS, before=lambda: faccel.barrier(ctx))
    if not ctx.is_main:
        return
    rows = table(
        f"{NUM_LEAVES} leaves float32{list(SHAPE)}, {ctx.world_size} processes, time per call",
        seconds,
        "torch, once per tensor",
        calls=CALLS,
    )
    speed_up = spread(ratios(seconds, "accelerate", "faccel"))
    print(
        "accelerate / faccel: {median:.1f} [{first_quartile:.1f}, {third_quartile:.1f}]".format(
            **speed_up
        )
    )
    report(
        "gather",
        {
            "leaves": NUM_LEAVES,
            "shape": SHAPE,
            "processes": ctx.world_size,
            "calls_per_round": CALLS,
            "rounds": ROUNDS,
            "threads": 1,
        },
        {"time per call": rows, "accelerate / faccel": speed_up},
        [target("gather of 20 leaves, accelerate / faccel", speed_up["median"], at_least=8)],
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    with faccel.init(device="cpu") as ctx:
        assert ctx.world_size > 1, "start it with torchrun --nproc-per-node 2"
        main(ctx)
