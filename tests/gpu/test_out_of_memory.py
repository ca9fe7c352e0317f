"""Memory that really runs out, in forward, in backward and in the optimizer of a user's step."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import faccel
from faccel.training.out_of_memory import is_out_of_memory

TOO_MANY_BYTES = 1 << 50
MAX_ROWS = 4


def exhaust(device):
    """Allocate more than any device has; PyTorch's allocator raises."""
    torch.empty(TOO_MANY_BYTES, dtype=torch.uint8, device=device)


class ExhaustInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        exhaust(grad.device)
        return grad


def test_the_error_of_the_allocator_is_recognised(device):
    with pytest.raises(RuntimeError) as caught:
        exhaust(device)
    assert is_out_of_memory(caught.value)
    if device.type == "cuda":
        assert isinstance(caught.value, torch.OutOfMemoryError)


def train(ctx, batch_size, loss_of_rows, **policy):
    """Train one epoch of 16 rows; return the weights, the scaler and the number of losses."""
    torch.manual_seed(0)
    x = torch.randn(16, 8)
    loader = faccel.shard(DataLoader(TensorDataset(x, x.sum(1)), batch_size), ctx)
    net = faccel.wrap(torch.nn.Linear(8, 1), ctx)
    opt = faccel.wrap_optimizer(torch.optim.SGD(net.parameters(), lr=0.1), net, ctx)
    scaler = faccel.init_scaler(ctx)

    def loss_fn(net, batch):
        x, y = batch.data
        prediction = loss_of_rows(net(x).squeeze(-1))
        # Dropout on the device: the window that runs again draws the same numbers.
        return F.mse_loss(F.dropout(prediction, 0.1), y)

    num_losses = 0
    for window in faccel.windows(loader, ctx, size=16 // batch_size):
        losses, scaler = faccel.forward_backward(loss_fn, net, window, scaler, ctx, **policy)
        _, scaler = faccel.optimizer_step(opt, scaler, ctx)
        num_losses += len(losses)
    return net.weight.detach().cpu(), scaler, num_losses


def in_forward(prediction):
    if len(prediction) > MAX_ROWS:
        exhaust(prediction.device)
    return prediction


def in_backward(prediction):
    if len(prediction) > MAX_ROWS:
        return ExhaustInBackward.apply(prediction)
    return prediction


@pytest.mark.parametrize("where", [in_forward, in_backward])
def test_a_window_is_run_again_with_smaller_micro_batches(ctx, where):
    weights, scaler, num_losses = train(ctx, 16, where, retry=faccel.Retry(split=2))
    assert scaler.max_rows == MAX_ROWS and num_losses == 4
    # The same result as of a run that had micro-batches of this size from the start.
    expected, _, _ = train(ctx, MAX_ROWS, lambda prediction: prediction)
    assert torch.equal(weights, expected)


def test_a_window_that_does_not_fit_is_left_out(ctx):
    weights, scaler, _ = train(ctx, 16, in_backward, skip=(torch.OutOfMemoryError, RuntimeError))
    torch.manual_seed(0)
    torch.randn(16, 8)
    assert torch.equal(weights, torch.nn.Linear(8, 1).weight)
    assert scaler.num_skipped == 1


def test_the_largest_batch_size_is_found(ctx):
    sizes = []

    def trial(batch_size):
        sizes.append(batch_size)
        train(ctx, batch_size, in_backward)

    assert faccel.find_batch_size(trial, ctx, start=16) == MAX_ROWS
    assert sizes == [16, 8, 4]


@pytest.fixture
def limited_memory(cuda):
    """Let this process allocate 512 MiB more than it has."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(cuda).total_memory
    limit = torch.cuda.memory_reserved(cuda) + (512 << 20)
    torch.cuda.set_per_process_memory_fraction(limit / total, cuda)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0, cuda)
    torch.cuda.empty_cache()


def test_activations_that_do_not_fit_are_computed_in_smaller_batches(limited_memory):
    with faccel.init(env={}, device="cuda") as ctx:
        before = torch.cuda.memory_allocated()
        layers = [torch.nn.Linear(1024, 1024) for _ in range(8)]
        net = faccel.wrap(torch.nn.Sequential(*layers), ctx)
        x = torch.randn(1 << 15, 1024)  # 128 MiB, and as much after each layer
        loader = faccel.shard(DataLoader(x, len(x)), ctx)
        (window,) = faccel.windows(loader, ctx)
        losses, scaler = faccel.forward_backward(
            lambda net, batch: net(batch.data).square().mean(),
            net, window, faccel.init_scaler(ctx), ctx, retry=faccel.Retry(),
        )  # fmt: skip
        assert len(losses) > 1 and len(losses) == len(x) // scaler.max_rows
        assert all(param.grad.isfinite().all() for param in net.parameters())
        # The failed attempts have left nothing on the device.
        assert torch.cuda.memory_allocated() - before < 300 << 20
