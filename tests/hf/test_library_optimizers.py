"""Optimizers of bitsandbytes and torchao: in each layout equal to one process, or refused."""

import pytest
import torch
from torch import nn

import faccel
from faccel.errors import OptimizerError
from faccel.parallel import DdpConfig
from faccel.testing import simulate
from faccel.tree import full_tensor

pytestmark = pytest.mark.filterwarnings("ignore")

ROWS = torch.randn(8, 256, generator=torch.Generator().manual_seed(1))
TENSOR = {"0": "colwise", "2": "rowwise"}
ZERO1 = faccel.Plan(ddp=DdpConfig(shard_optimizer=True))
REPLICAS = {
    "DDP": (2, "dp_replicate=2", None),
    "ZeRO-1": (2, "dp_replicate=2", ZERO1),
}
SHARDS = {
    "FSDP2": (2, "dp_shard=2", None),
    "HSDP": (4, "dp_replicate=2,dp_shard=2", None),
    "FSDP2, offloaded": (2, "dp_shard=2", faccel.Plan(offload=True)),
}
TENSOR_PARALLEL = {
    "tensor parallel": (2, "tp=2", faccel.Plan(tensor=TENSOR)),
    "FSDP2 over tensor parallel": (4, "dp_shard=2,tp=2", faccel.Plan(tensor=TENSOR)),
}
BITSANDBYTES = (
    "AdamW", "AdamW8bit", "PagedAdamW8bit", "Lion8bit", "LAMB8bit", "LARS", "SGD8bit",
    "AdEMAMix8bit", "RMSprop8bit", "Adagrad8bit",
)  # fmt: skip
MOMENTUM = ("LARS", "SGD8bit")  # these raise without
LOW_BIT = ("AdamW8bit", "AdamW4bit", "AdamWFp8")


@pytest.fixture(autouse=True)
def without_compiler():
    """torchao compiles its step, and so does bitsandbytes on a CPU, which takes a minute here."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture
def bnb():
    return pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 64), nn.Tanh(), nn.Linear(64, 256))


def make_optimizer(library, name, params):
    options = {"momentum": 0.9} if name in MOMENTUM else {}
    return getattr(pytest.importorskip(library), name)(params, lr=1e-2, **options)


def plain_torch(library, name, num_steps=3):
    """Return the parameters that the same loop without faccel trains in one process."""
    model = net()
    opt = make_optimizer(library, name, model.parameters())
    for _ in range(num_steps):
        (model(ROWS) - ROWS).square().mean().backward()
        opt.step()
        opt.zero_grad()
    return {key: value.detach() for key, value in model.named_parameters()}


def make(ctx, library, name, plan):
    model = faccel.wrap(net(), ctx, plan=plan)
    opt = make_optimizer(library, name, model.parameters())
    return model, faccel.wrap_optimizer(opt, model, ctx)


def train(model, opt, ctx, num_steps):
    for _ in range(num_steps):
        rows = ROWS[ctx.data_rank :: ctx.data_world_size]
        loss = (model(rows) - rows).square().mean()
        scaler = faccel.scaled_backward(loss, faccel.init_scaler(ctx), ctx)
        faccel.optimizer_step(opt, scaler, ctx)


def parameters(model):
    return {key: full_tensor(value).detach().clone() for key, value in model.named_parameters()}


def train_new(ctx, library, name, plan):
    model, opt = make(ctx, library, name, plan)
    train(model, opt, ctx, 3)
    return parameters(model)


def check_equal_to_one_process(library, name, layout, tolerance):
    num_ranks, mesh, plan = layout
    expected = plain_torch(library, name)
    for params in simulate(train_new, num_ranks, library, name, plan, mesh=mesh):
        for key, value in expected.items():
            torch.testing.assert_close(params[key], value, rtol=0, atol=tolerance)


@pytest.mark.parametrize("layout", REPLICAS)
@pytest.mark.parametrize("name", BITSANDBYTES)
def test_bitsandbytes_trains_replicas_as_one_process(bnb, name, layout):
    # A step changes a parameter by up to 0.01; Adam divides by noise where gradients are 0.
    check_equal_to_one_process("bitsandbytes.optim", name, REPLICAS[layout], 1e-4)


@pytest.mark.parametrize("layout", SHARDS | TENSOR_PARALLEL)
@pytest.mark.parametrize("name", BITSANDBYTES[:5])
def test_bitsandbytes_refuses_shards_before_the_first_step(bnb, name, layout):
    num_ranks, mesh, plan = (SHARDS | TENSOR_PARALLEL)[layout]
    with pytest.raises(OptimizerError, match="bitsandbytes do not step sharded"):
        simulate(make, num_ranks, "bitsandbytes.optim", name, plan, mesh=mesh)


def test_a_class_of_bitsandbytes_is_refused_where_it_is_not_installed():
    of_bitsandbytes = type("AdamW8bit", (torch.optim.AdamW,), {})
    of_bitsandbytes.__module__ = "bitsandbytes.optim.adamw"
    subclass = type("Mine", (of_bitsandbytes,), {})

    def wrap(ctx):
        model = faccel.wrap(net(), ctx)
        faccel.wrap_optimizer(subclass(model.parameters()), model, ctx)

    simulate(wrap, 2, mesh="dp_replicate=2")
    with pytest.raises(OptimizerError, match="bitsandbytes do not step sharded"):
        simulate(wrap, 2, mesh="dp_shard=2")


def save_and_train(ctx, name, plan, folder):
    model, opt = make(ctx, "bitsandbytes.optim", name, plan)
    train(model, opt, ctx, 2)
    faccel.save({"model": model, "opt": opt}, folder, ctx, step=2)
    train(model, opt, ctx, 1)
    return parameters(model)


def load_and_train(ctx, name, plan, folder):
    model, opt = make(ctx, "bitsandbytes.optim", name, plan)
    faccel.load({"model": model, "opt": opt}, folder, ctx)
    train(model, opt, ctx, 1)
    return parameters(model)


@pytest.mark.parametrize("name", ["AdamW8bit", "LAMB8bit", "AdEMAMix8bit"])
@pytest.mark.parametrize(("saved", "loaded"), [("ZeRO-1", "DDP"), ("DDP", "ZeRO-1")])
def test_a_checkpoint_of_bitsandbytes_resumes_bit_for_bit(bnb, tmp_path, name, saved, loaded):
    num_ranks, mesh, plan = REPLICAS[saved]
    expected = simulate(save_and_train, num_ranks, name, plan, tmp_path, mesh=mesh)[0]
    num_ranks, mesh, plan = REPLICAS[loaded]
    for params in simulate(load_and_train, num_ranks, name, plan, tmp_path, mesh=mesh):
        torch.testing.assert_close(params, expected, rtol=0, atol=0)


def test_options_by_the_number_of_a_parameter_are_refused_under_zero1(bnb):
    manager = bnb.optim.GlobalOptimManager.get_instance()
    manager.index2config[0, 1] = {"optim_bits": 32}  # as `register_parameters` stores them
    try:
        with pytest.raises(OptimizerError, match="GlobalOptimManager"):
            simulate(make, 2, "bitsandbytes.optim", "AdamW8bit", ZERO1)
        simulate(make, 2, "bitsandbytes.optim", "AdamW8bit", None)
    finally:
        manager.index2config.clear()


@pytest.mark.slow
@pytest.mark.parametrize("layout", REPLICAS | SHARDS)
@pytest.mark.parametrize("name", ["AdamW8bit", "_AdamW"])
def test_torchao_trains_as_one_process(name, layout):
    check_equal_to_one_process("torchao.optim", name, (REPLICAS | SHARDS)[layout], 1e-3)


@pytest.mark.parametrize("layout", TENSOR_PARALLEL)
@pytest.mark.parametrize("name", LOW_BIT)
def test_low_bit_states_are_refused_where_their_blocks_would_be_others(name, layout):
    pytest.importorskip("torchao")
    num_ranks, mesh, plan = TENSOR_PARALLEL[layout]
    with pytest.raises(OptimizerError, match="other blocks than on one process"):
        simulate(make, num_ranks, "torchao.optim", name, plan, mesh=mesh)


@pytest.mark.slow
@pytest.mark.parametrize("layout", TENSOR_PARALLEL)
def test_states_that_are_not_quantized_have_no_blocks(layout):
    check_equal_to_one_process("torchao.optim", "_AdamW", TENSOR_PARALLEL[layout], 1e-4)


def test_an_optimizer_that_copies_gradients_in_backward_is_refused():
    offload = pytest.importorskip("torchao.optim").CPUOffloadOptimizer

    def wrap(ctx):
        model = faccel.wrap(net(), ctx)
        # Its constructor needs a GPU.
        faccel.wrap_optimizer(object.__new__(offload), model, ctx)

    for num_ranks in (1, 2):
        with pytest.raises(OptimizerError, match="copies gradients to the host"):
            simulate(wrap, num_ranks)
