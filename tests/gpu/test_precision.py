"""fp32, bf16 and fp16 on the device, beside the same training in plain PyTorch."""

import pytest
import torch

import faccel
from tests.gpu.plain import assert_same, plain_training, training

# Equal operations in equal order: on a GPU, too, the results are equal bit for bit where the
# kernels are deterministic. Embeddings add their gradients by atomic operations.
TOLERANCES = {"no": 1e-5, "bf16": 2e-2, "fp16": 2e-3}


@pytest.mark.parametrize("precision", TOLERANCES)
def test_training_equals_plain_torch(device, precision):
    with faccel.init(env={}, device=str(device), mixed_precision=precision) as ctx:
        assert_same(training(ctx), plain_training(device, precision), TOLERANCES[precision])


def test_an_overflow_in_fp16_is_skipped_and_halves_the_scale_as_in_torch(device):
    with faccel.init(env={}, device=str(device), mixed_precision="fp16") as ctx:
        losses, params, norms, scaler, infos = training(ctx, overflow_at=2, scale=1024.0)
        plain = plain_training(device, "fp16", overflow_at=2, scale=1024.0)
        assert scaler.scale == plain[3] == 512.0
        assert [info.skipped for info in infos] == [step == 2 for step in range(6)]
        assert scaler.num_skipped == 1
        assert all(param.isfinite().all() for param in params)
        del losses[2], norms[2], plain[0][2], plain[2][2]  # infinite
        assert_same((losses, params, norms), plain, TOLERANCES["fp16"])


def test_a_scale_that_is_too_large_overflows_in_the_activations_and_backs_off(device):
    with faccel.init(env={}, device=str(device), mixed_precision="fp16") as ctx:
        # Gradients of fp16 overflow above 65504: a real overflow, without an injected infinity.
        _, params, _, scaler, infos = training(ctx, scale=2.0**40)
        assert infos[0].skipped and scaler.num_skipped >= 1
        assert scaler.scale == 2.0 ** (40 - scaler.num_skipped)
        assert all(param.isfinite().all() for param in params)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_matrices_are_multiplied_in_low_precision_and_outputs_are_fp32(device, precision):
    dtypes = []

    class Net(torch.nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            dtypes.append(y.dtype)
            return y

    with faccel.init(env={}, device=str(device), mixed_precision=precision) as ctx:
        output = faccel.wrap(Net(8, 8), ctx)(torch.ones(2, 8, device=device))
    assert dtypes == [ctx.compute_dtype] and output.dtype == torch.float32


def test_skip_nonfinite_leaves_out_an_update_in_bf16(device):
    with faccel.init(env={}, device=str(device), mixed_precision="bf16") as ctx:
        net = faccel.wrap(torch.nn.Linear(4, 4), ctx)
        opt = faccel.wrap_optimizer(torch.optim.SGD(net.parameters(), lr=1.0), net, ctx)
        before = net.weight.detach().clone()
        loss = net(torch.full((2, 4), float("nan"), device=device)).sum()
        scaler = faccel.scaled_backward(loss, faccel.init_scaler(ctx), ctx)
        info, scaler = faccel.optimizer_step(opt, scaler, ctx, skip_nonfinite=True)
        assert info.skipped and torch.equal(net.weight, before)
