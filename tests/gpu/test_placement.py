"""Where tensors are: models, batches, buffers, random numbers; a device that does not exist."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import faccel
from faccel import device_table
from faccel.errors import DeviceError
from faccel.testing import selftest
from tests.models import loss_of, model, tokens


def test_the_context_has_the_accelerator_and_it_is_the_current_device(cuda):
    with faccel.init(env={}) as ctx:
        assert ctx.device == cuda
        assert torch.accelerator.current_device_index() == 0
    # torchrun's local rank chooses the device.
    env = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    with faccel.init(env=env | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}) as ctx:
        assert ctx.device == cuda


def test_models_and_batches_are_on_the_device(ctx):
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    wrapped = faccel.wrap(net, ctx)
    assert {tensor.device for tensor in wrapped.state_dict().values()} == {ctx.device}
    x = torch.arange(32.0).view(8, 4)
    data = TensorDataset(x, torch.arange(8))
    for pin_memory in {False, ctx.device.type == "cuda"}:
        loader = faccel.shard(DataLoader(data, 4, pin_memory=pin_memory), ctx)
        rows, labels = zip(*loader, strict=True)
        assert {tensor.device for tensor in (*rows, *labels)} == {ctx.device}
        assert torch.equal(torch.cat(rows).cpu(), x)
    unmoved = faccel.shard(DataLoader(data, 4), ctx, device_placement=False)
    assert next(iter(unmoved))[0].device.type == "cpu"


def test_parameters_stay_the_same_objects_with_ties_and_gradients(ctx):
    net = model(torch.float32)
    loss_of(net(tokens(2)[:, :-1]), tokens(2)[:, 1:]).backward()
    params = dict(net.named_parameters(remove_duplicate=False))
    grads = {name: param.grad.clone() for name, param in params.items()}
    opt = torch.optim.AdamW(net.parameters())
    faccel.wrap_optimizer(opt, faccel.wrap(net, ctx), ctx)
    for name, param in net.named_parameters(remove_duplicate=False):
        assert param is params[name] and param.device == ctx.device
        assert torch.equal(param.grad.cpu(), grads[name])
    assert net.head.weight is net.embed.token.weight


def test_a_device_that_does_not_exist_is_an_error(device):
    missing = f"cuda:{torch.cuda.device_count()}"
    with pytest.raises(DeviceError, match="no `cuda` device"):
        faccel.init(env={}, device=missing)


def test_a_second_process_of_the_node_without_a_device_is_an_error(cuda):
    count = torch.cuda.device_count()
    env = {"RANK": str(count), "LOCAL_RANK": str(count), "MASTER_ADDR": "127.0.0.1"}
    env |= {"WORLD_SIZE": str(count + 1), "LOCAL_WORLD_SIZE": str(count + 1), "MASTER_PORT": "1"}
    with pytest.raises(DeviceError, match=f"start {count} processes"):
        faccel.init(env=env)


def test_random_numbers_come_from_the_generator_of_the_device(ctx):
    generator = device_table.default_generator(ctx.device)
    assert generator.device.type == ctx.device.type
    faccel.seed_everything(3, ctx)
    first = torch.rand(4, device=ctx.device)
    faccel.seed_everything(3, ctx)
    state = generator.get_state()
    assert torch.equal(torch.rand(4, device=ctx.device), first)
    generator.set_state(state)
    assert torch.equal(torch.rand(4, device=ctx.device, generator=generator), first)


def test_the_versions_of_cuda_and_nccl_are_listed(cuda):
    versions = device_table.library_versions("cuda")
    assert versions["CUDA"] == torch.version.cuda
    assert versions["NCCL"] == ".".join(map(str, torch.cuda.nccl.version()))


def test_the_selftest_passes(ctx, capsys):
    assert selftest.run(ctx) == 0
