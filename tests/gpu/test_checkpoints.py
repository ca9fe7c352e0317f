"""Checkpoints of tensors on the device: pinned copies, another device, resume bit for bit."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import faccel
from tests.gpu.world_of_one import world_of_one
from tests.models import loss_of, model, tokens

LAYOUTS = {"single": None, "ddp": "ddp", "fsdp": "sharded"}


def context(device, layout, precision="no"):
    strategy = LAYOUTS[layout]
    if strategy is None:
        return faccel.init(env={}, device=str(device), mixed_precision=precision)
    return world_of_one(device, strategy, mixed_precision=precision)


def state_of(ctx):
    net = faccel.wrap(model(torch.float32, tied=False), ctx, plan=faccel.Plan(units="Block"))
    opt = torch.optim.AdamW(net.parameters(), lr=1e-2)
    opt = faccel.wrap_optimizer(opt, net, ctx)
    return {
        "net": net,
        "opt": opt,
        "scaler": faccel.init_scaler(ctx),
        "rng": faccel.rng_state(ctx),
    }


def train(state, ctx, epoch):
    """Train an epoch with dropout on the device; return the losses. Updates `state`."""
    losses = []
    for batch in faccel.shard(DataLoader(tokens(16), 4, shuffle=True), ctx).at(epoch):
        logits = state["net"](batch[:, :-1])
        # Draws from the generator of the device.
        loss = loss_of(nn.functional.dropout(logits, 0.2), batch[:, 1:])
        state["scaler"] = faccel.scaled_backward(loss, state["scaler"], ctx)
        _, state["scaler"] = faccel.optimizer_step(state["opt"], state["scaler"], ctx)
        losses.append(loss.item())
    return losses


@pytest.fixture
def deterministic(monkeypatch):
    """Deterministic kernels: the gradients of embeddings are not added by atomic operations."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("background", "precision"), [(False, "no"), (True, "bf16"), (True, "fp16")]
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_resumed_run_has_the_same_bits(
    device, tmp_path, layout, background, precision, deterministic
):
    with context(device, layout, precision) as ctx:
        faccel.seed_everything(0, ctx)
        state = state_of(ctx)
        train(state, ctx, 0)
        state["rng"] = faccel.rng_state(ctx)
        faccel.save(state, tmp_path, ctx, step=1, background=background)
        expected = train(state, ctx, 1)
        faccel.seed_everything(1, ctx)
        resumed = faccel.load(state_of(ctx), tmp_path, ctx)
        faccel.set_rng_state(resumed["rng"])
        assert train(resumed, ctx, 1) == expected
        for param, reference in zip(
            resumed["net"].parameters(), state["net"].parameters(), strict=True
        ):
            assert param.device == ctx.device and torch.equal(param, reference)


def test_a_background_save_stores_the_values_of_the_call(ctx, tmp_path):
    # Large enough that the copy to the host has not ended when the next kernel starts.
    values = torch.arange(1 << 20, device=ctx.device, dtype=torch.float32)
    for step in range(1, 4):
        faccel.save({"x": values}, tmp_path, ctx, step=step, background=True)
        values += 1  # at once, on the same stream
    for step in range(1, 4):
        loaded = faccel.load({"x": values.clone()}, tmp_path, ctx, step=step)["x"]
        assert loaded.device == ctx.device
        assert torch.equal(loaded, torch.arange(1 << 20, device=ctx.device) + step - 1.0)


def test_a_background_save_copies_into_pinned_memory(cuda, tmp_path):
    with faccel.init(env={}, device="cuda") as ctx:
        before = torch.cuda.host_memory_stats()
        x = torch.ones(1 << 20, device=cuda)
        faccel.save({"x": x}, tmp_path, ctx, step=1, background=True)
        after = torch.cuda.host_memory_stats()
    # PyTorch's versions name the bytes in use differently; cached blocks may serve them.
    names = [name for name in after if name.endswith("bytes.allocated")]
    assert max(after[name] - before[name] for name in names) >= x.nbytes


@pytest.mark.parametrize("direction", ["from the CPU", "to the CPU"])
def test_a_checkpoint_loads_on_another_type_of_device(device, tmp_path, direction):
    devices = [torch.device("cpu"), device]
    if direction == "to the CPU":
        devices.reverse()
    stored = []
    for target in devices:
        with faccel.init(env={}, device=str(target), mixed_precision="fp16") as ctx:
            state = state_of(ctx)
            if not stored:
                train(state, ctx, 0)
                faccel.save(state, tmp_path, ctx, step=1)
            del state["rng"]  # the generator of a device has no counterpart on another one
            state = faccel.load(state, tmp_path, ctx)
            tensors = [param.detach().cpu() for param in state["net"].parameters()]
            for param_state in state["opt"].state.values():
                tensors += [param_state[name].cpu() for name in ("exp_avg", "exp_avg_sq", "step")]
                assert param_state["exp_avg"].device == ctx.device
            stored.append((tensors, state["scaler"].scale))
    assert stored[0][1] == stored[1][1]
    assert all(map(torch.equal, stored[0][0], stored[1][0]))


def test_fsdp_and_one_process_load_each_others_checkpoints(device, tmp_path):
    values = []
    for step, layout in enumerate(("fsdp", "single", "ddp", "fsdp"), start=1):
        with context(device, layout) as ctx:
            faccel.seed_everything(step, ctx)
            state = state_of(ctx)
            if step > 1:
                state = faccel.load(state, tmp_path, ctx)
            else:
                train(state, ctx, 0)
            faccel.save(state, tmp_path, ctx, step=step)
            values.append(faccel.parallel.full_state_dict(state["net"], ctx))
    for later in values[1:]:
        for name, value in values[0].items():
            assert torch.equal(later[name], value)


def test_an_export_of_a_model_on_the_device_is_loaded_by_plain_torch(ctx, tmp_path):
    import safetensors.torch

    net = faccel.wrap(model(torch.float32, tied=False), ctx)
    faccel.checkpoint.export_model(net, tmp_path, ctx)
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    fresh = model(torch.float32, tied=False)
    fresh.load_state_dict(tensors)
    for name, value in fresh.state_dict().items():
        assert torch.equal(value, net.state_dict()[name].cpu())
