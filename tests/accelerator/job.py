"""What each rank runs on a pretended accelerator, and on the CPU of the same world to compare."""

import os
import pathlib
import pickle
import tempfile

import safetensors.torch
import torch
from torch.utils.data import DataLoader

import faccel
from faccel import func
from faccel.device_table import KINDS
from faccel.testing import selftest
from tests import functional
from tests.models import model, tokens
from tests.ranks import env_of
from tests.training import loss_fn, plan_of, train

ZERO_1 = faccel.Plan(ddp=faccel.parallel.DdpConfig(shard_optimizer=True))
# A row of `BACKENDS` each, and the combinations of its axes.
LAYOUTS = {
    "single": (None, None),
    "ddp": ("dp_replicate=2", None),
    "zero-1": ("dp_replicate=2", ZERO_1),
    "fsdp": ("dp_shard=2", plan_of("")),
    "fsdp offloaded": ("dp_shard=2", plan_of("", offload=True)),
    "tp": ("tp=2", plan_of("tp=")),
    "pipeline": ("pp=2", plan_of("pp=")),
    # of four processes
    "hsdp": ("dp_replicate=2,dp_shard=2", plan_of("")),
    "fsdp tp": ("dp_shard=2,tp=2", plan_of("tp=")),
    "fsdp pipeline": ("dp_shard=2,pp=2", plan_of("pp=")),
}
ON_FOUR = ("hsdp", "fsdp tp", "fsdp pipeline")
# Equal sums in another order, and for fp16 and bf16 other autocast rules: the CPU computes the
# norms of layers in the low precision, an accelerator in fp32.
TOLERANCES = {"no": 2e-6, "bf16": 3e-2, "fp16": 4e-3}
SAVED = ("single", "ddp", "fsdp", "tp", "pipeline")
# What this rank has trained on the CPU, by layout and precision.
TRAINED_ON_CPU = {}


def launch_env(kind):
    """The variable of the environment that a launcher sets for a kind of device."""
    variable = KINDS[kind].launch_variable
    return {variable: "localhost:1"} if variable else {}


def context(layout, world, device, precision="no"):
    """The context of a layout; `single` is a world of one process."""
    mesh, _ = LAYOUTS[layout]
    env = {}
    if mesh is not None:
        env = env_of(world.rank, world.world_size, world.topology.main_port)
        env |= launch_env(torch.device(device).type)
    return faccel.init(env=env, mesh=mesh, device=device, mixed_precision=precision)


def to_host(trained):
    trained.params.update({name: tensor.cpu() for name, tensor in trained.params.items()})
    for grads in trained.grads:
        grads.update({name: tensor.cpu() for name, tensor in grads.items()})
    return trained


def trained(layout, world, device, precision):
    with context(layout, world, device, precision) as ctx:
        assert ctx.device == torch.device(device)
        result = train(ctx, LAYOUTS[layout][1], dtype=torch.float32)
        place = torch.device("cpu") if "offloaded" in layout else ctx.device
        wrong = [name for name, tensor in result.params.items() if tensor.device != place]
        assert not wrong, f"{wrong} are not on {place}"
        return to_host(result)


def difference(numbers, expected):
    return (torch.tensor(numbers) - torch.tensor(expected)).abs().max().item()


def difference_of_dicts(tensors, expected):
    assert tensors.keys() == expected.keys()
    return max((tensors[name] - expected[name]).abs().max().item() for name in tensors)


def train_cell(layout, world, precision):
    """Raise unless a training equals that on the CPU."""
    actual = trained(layout, world, str(world.device), precision)
    expected = TRAINED_ON_CPU[layout, precision]
    errors = {
        "losses": difference(actual.losses, expected.losses),
        "norms": difference(actual.norms, expected.norms),
        "grads": max(map(difference_of_dicts, actual.grads, expected.grads)),
        "params": difference_of_dicts(actual.params, expected.params),
    }
    # AdamW divides a gradient by its size: it turns rounding errors of small ones into steps.
    assert errors.pop("params") < 1e-3 or precision != "no", errors
    if precision != "no":
        del errors["grads"]
    assert max(errors.values()) < TOLERANCES[precision], errors


def state_of(ctx, layout):
    wrapped = faccel.wrap(model(torch.float32, tied=False), ctx, plan=LAYOUTS[layout][1])
    opt = torch.optim.AdamW(wrapped.parameters(), lr=0.01)
    opt = faccel.wrap_optimizer(opt, wrapped, ctx)
    return {"model": wrapped, "opt": opt, "scaler": faccel.init_scaler(ctx), "rng": None}


def noisy_loss(net, batch, ctx):
    """A loss that depends on the generator of the device."""
    return loss_fn(net, batch, ctx) * (1 + torch.rand((), device=ctx.device))


def losses_of(state, ctx, epoch):
    loader = faccel.shard(DataLoader(tokens(32), 4, pin_memory=True), ctx).at(epoch)
    losses = []
    # The weights are summed in the widest type of the device.
    for window in faccel.windows(loader, ctx, size=2, weight=lambda batch: batch.data.shape[0]):
        window_losses, scaler = faccel.forward_backward(
            lambda net, batch: noisy_loss(net, batch.data, ctx),
            state["model"],
            window,
            state["scaler"],
            ctx,
        )
        _, state["scaler"] = faccel.optimizer_step(state["opt"], scaler, ctx, clip_norm=0.5)
        losses.append(window_losses.tolist())
    return losses


def checkpoint_cell(layout, world, precision, *, background):
    """Raise unless a run that resumes from a checkpoint has the losses of one that did not stop."""
    with context(layout, world, str(world.device), precision) as ctx:
        folder = pathlib.Path(faccel.broadcast_objects([tempfile.mkdtemp()], ctx)[0])
        faccel.seed_everything(0, ctx)
        state = state_of(ctx, layout)
        losses_of(state, ctx, 0)
        state["rng"] = faccel.rng_state(ctx)
        faccel.save(state, folder / "run", ctx, step=1, background=background)
        expected = losses_of(state, ctx, 1)
        faccel.seed_everything(1, ctx)
        fresh = state_of(ctx, layout)
        fresh["rng"] = faccel.rng_state(ctx)
        fresh = faccel.load(fresh, folder / "run", ctx)
        faccel.set_rng_state(fresh["rng"])
        assert losses_of(fresh, ctx, 1) == expected
        faccel.checkpoint.export_model(state["model"], folder / "export", ctx)
        exported = safetensors.torch.load_file(folder / "export" / "model.safetensors")
        values = state["model"].module.state_dict() if ctx.is_main and layout == "ddp" else {}
        assert all(torch.equal(exported[name], value.cpu()) for name, value in values.items())


def func_cell(layout, world, precision):
    """Raise unless the functional step with dropout equals that on the CPU, and is repeatable."""
    results = []
    for device in (str(world.device), str(world.device), "cpu"):
        with context(layout, world, device, precision) as ctx:
            net = functional.net(dtype=torch.float32, dropout=0.2)
            optimizer = func.chain(func.clip_by_global_norm(1.0), func.adamw(1e-2))
            state = func.init_state(net, optimizer, ctx, seed=0)
            step = func.make_step(functional.loss_of(net), optimizer, ctx)
            for number in range(3):
                batch = functional.batch_of(number, ctx, torch.float32)
                metrics, state = step(state, tuple(x.to(ctx.device) for x in batch))
            results.append(metrics["loss"].item())
    assert results[0] == results[1]
    assert abs(results[0] - results[2]) < TOLERANCES[precision]


def moved_cell(layout, world, precision):
    """Raise unless parameters stay the same objects on the device, with their ties and gradients.

    `nn.Module.to` replaces them on devices of plugins.
    """
    with context(layout, world, str(world.device), precision) as ctx:
        net = model(torch.float32)
        net(tokens(2)[:, :-1]).sum().backward()
        params = dict(net.named_parameters(remove_duplicate=False))
        grads = {name: param.grad.clone() for name, param in params.items()}
        opt = torch.optim.SGD(net.parameters(), lr=1.0)
        faccel.wrap_optimizer(opt, faccel.wrap(net, ctx), ctx)
        for name, param in net.named_parameters(remove_duplicate=False):
            assert param is params[name] and param.device == ctx.device
            assert torch.equal(param.grad.cpu(), grads[name])
        assert net.head.weight is net.embed.token.weight


def selftest_cell(layout, world, precision):
    """Raise unless `faccel test` passes."""
    with context(layout, world, str(world.device), precision) as ctx:
        assert selftest.run(ctx) == 0


def cells(kind, world_size):
    """Name to the function, layout and precision of each cell on a number of processes."""
    if world_size == 4:
        return {f"{layout} no": (train_cell, layout, "no", {}) for layout in ON_FOUR}
    table = {}
    for precision in TOLERANCES:
        for layout in LAYOUTS.keys() - set(ON_FOUR):
            table[f"{layout} {precision}"] = (train_cell, layout, precision, {})
    for layout in SAVED:
        for background in (False, True):
            name = f"{layout} saved" + " in the background" * background
            table[name] = (checkpoint_cell, layout, "fp16", {"background": background})
    for layout in ("single", "ddp"):
        table[f"func {layout} no"] = (func_cell, layout, "no", {})
        table[f"moved {layout} no"] = (moved_cell, layout, "no", {})
        table[f"faccel test {layout}"] = (selftest_cell, layout, "no", {})
    # The manners of musa, those of CUDA, differ from npu's in float64 only. CELLS repeats some.
    chosen = os.environ.get("CELLS") or {"musa": " no"}.get(kind, "")
    return {name: table[name] for name in sorted(table) if chosen in name}


def debug_cell(world):
    """In debug mode a group of faccel is between c10d and the library of the device."""
    total = faccel.reduce(torch.ones(2, device=world.device), world)
    torch.distributed.all_reduce(total)
    assert total.tolist() == [4.0, 4.0] and total.device == world.device
    return torch.distributed.Backend.default_device_backend_map[world.device.type]


def train_on_cpu(world):
    """Return what the cells that train are compared with, for any kind of device."""
    table = {}
    for cell, layout, precision, _ in cells(None, world.world_size).values():
        if cell is train_cell:
            table[layout, precision] = trained(layout, world, "cpu", precision)
    return table


def run_cells(world, trained_on_cpu):
    """Run all cells; return their names. The error of the first one that fails names it.

    `trained_on_cpu` has the pickled result of `train_on_cpu` for each rank.
    """
    TRAINED_ON_CPU.update(pickle.loads(trained_on_cpu[world.rank]))
    names = []
    for name, (cell, layout, precision, options) in cells(
        world.device.type, world.world_size
    ).items():
        try:
            cell(layout, world, precision, **options)
        except Exception as error:
            error.add_note(f"in the cell {name}")
            raise
        names.append(name)
    return names
