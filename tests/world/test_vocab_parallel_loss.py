"""Cross-entropy of logits whose vocabulary is sharded, against PyTorch's on one process."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import faccel
from faccel.errors import ConfigError, DataError, ModelError
from faccel.testing import fake_context, simulate

pytestmark = pytest.mark.filterwarnings("ignore")  # PyTorch's advice on layouts
VOCABULARY = 8
PLAN = faccel.Plan(tensor={"head": "colwise_loss"})
ROWS = torch.randn(3, 5, 4, generator=faccel.random.generator(0), dtype=torch.float64)
TARGETS = torch.randint(VOCABULARY, (3, 5), generator=faccel.random.generator(1))
TARGETS[0, 2] = TARGETS[2, 4] = -100


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(4, VOCABULARY, bias=False, dtype=torch.float64)

    def forward(self, x):
        return self.head(x)


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@pytest.mark.parametrize("mesh", ["dp_replicate=1", "tp=2", "tp=4"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_loss_and_its_gradients_equal_pytorchs(mesh, reduction):
    def run(ctx):
        model = faccel.wrap(Net(), ctx, plan=PLAN)
        logits = model(ROWS)
        loss = faccel.parallel.cross_entropy(logits, TARGETS, ctx, reduction=reduction)
        # The second backward finds what the first has saved.
        for _ in range(2):
            loss.square().sum().backward(retain_graph=True)
        width = logits.to_local().shape[-1] if hasattr(logits, "to_local") else VOCABULARY
        return loss.detach(), full(model.module.head.weight.grad), width

    net = Net()
    expected = F.cross_entropy(net(ROWS).flatten(0, 1), TARGETS.flatten(), reduction=reduction)
    (2 * expected.square().sum()).backward()
    size = faccel.MeshSpec.of(mesh).size
    for loss, grad, width in simulate(run, size, mesh=mesh):
        assert width == VOCABULARY // size
        assert torch.allclose(loss.flatten(), expected.flatten(), rtol=1e-13)
        assert torch.allclose(grad, net.head.weight.grad, rtol=1e-12)


def test_large_logits_do_not_overflow_and_16_bit_ones_are_computed_in_fp32():
    def run(ctx):
        from torch.distributed.tensor import DTensor, Shard

        rank, mesh = ctx.comm.rank("tp"), ctx.mesh.device_mesh["tp"]
        local = torch.full((1, 2), 3e4 - 1e4 * rank, dtype=torch.bfloat16, requires_grad=True)
        logits = DTensor.from_local(local, mesh, [Shard(1)])
        loss = faccel.parallel.cross_entropy(logits, torch.tensor([1]), ctx)
        loss.backward()
        return loss.item(), loss.dtype, local.grad.tolist()

    first, second = simulate(run, 2, mesh="tp=2")
    assert first == (pytest.approx(0.6931472), torch.float32, [[0.5, -0.5]])
    assert second == (pytest.approx(0.6931472), torch.float32, [[0.0, 0.0]])


def test_mistakes_raise():
    ctx = fake_context(0, 1)
    with pytest.raises(ConfigError):
        faccel.parallel.cross_entropy(
            torch.zeros(1, 2), torch.zeros(1).long(), ctx, reduction="avg"
        )
    with pytest.raises(DataError):
        faccel.parallel.cross_entropy(torch.zeros(1, 2), torch.zeros(2).long(), ctx)

    def outside(ctx):
        model = faccel.wrap(Net(), ctx, plan=PLAN)
        with pytest.raises(DataError, match="range\\(8\\)"):
            faccel.parallel.cross_entropy(model(ROWS), TARGETS.clamp(min=8), ctx)

    def gathered(ctx):
        from torch.distributed.tensor import DTensor, Replicate

        mesh = ctx.mesh.device_mesh["tp"]
        logits = DTensor.from_local(torch.zeros(1, 2), mesh, [Replicate()])
        with pytest.raises(ModelError, match="colwise_loss"):
            faccel.parallel.cross_entropy(logits, torch.tensor([1]), ctx)

    simulate(outside, 2, mesh="tp=2")
    simulate(gathered, 2, mesh="tp=2")


WRONG_TARGETS = {
    "after the vocabulary": torch.tensor([8]),
    "negative": torch.tensor([-1]),
    "int32": torch.tensor([1], dtype=torch.int32),
    "floats": torch.tensor([1.0]),
    "a list": [1],
}


@pytest.mark.parametrize("name", WRONG_TARGETS)
def test_wrong_targets_of_full_logits_are_the_errors_of_sharded_ones(name):
    with pytest.raises((DataError, ConfigError)) as error:
        faccel.parallel.cross_entropy(torch.zeros(1, 8), WRONG_TARGETS[name], fake_context(0, 1))
    assert error.value.fix


def test_logits_without_a_batch_have_one_loss():
    loss = faccel.parallel.cross_entropy(torch.zeros(8), torch.tensor(3), fake_context(0, 1))
    assert loss.item() == pytest.approx(torch.tensor(8.0).log().item())
