"""The same trainings in plain PyTorch and with faccel, on one device, for comparison."""

import torch

import faccel
from tests.models import loss_of, model, tokens

STEPS = 6
CLIP_NORM = 0.67  # above some norms of this training and below others
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def batches(device, count=STEPS):
    return [tokens(8, seed=step).to(device) for step in range(count)]


def sgd(net):
    # Not AdamW: it turns rounding errors of gradients near zero into full steps.
    return torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)


def gains_of(overflow_at):
    """Return what each step multiplies its loss by: infinity in the step that overflows."""
    return [float("inf") if step == overflow_at else 1.0 for step in range(STEPS)]


def plain_training(device, precision, overflow_at=None, scale=65536.0, depth=2):
    """Return losses, parameters, norms and the last loss scale of plain PyTorch."""
    net = model(torch.float32, tied=False, depth=depth).to(device)
    opt = sgd(net)
    grad_scaler = torch.amp.GradScaler(device.type, init_scale=scale, enabled=precision == "fp16")
    losses, norms = [], []
    for gain, batch in zip(gains_of(overflow_at), batches(device), strict=True):
        with torch.autocast(device.type, DTYPES.get(precision), enabled=precision != "no"):
            logits = net(batch[:, :-1])
        loss = loss_of(logits.float(), batch[:, 1:]) * gain
        grad_scaler.scale(loss).backward()
        grad_scaler.unscale_(opt)
        norms.append(torch.nn.utils.clip_grad_norm_(net.parameters(), CLIP_NORM))
        grad_scaler.step(opt)
        grad_scaler.update()
        opt.zero_grad()
        losses.append(loss.detach())
    return losses, list(net.parameters()), norms, grad_scaler.get_scale()


def training(ctx, plan=None, overflow_at=None, scale=None):
    """Return losses, parameters, norms, the last scaler and what each step returned."""
    net = faccel.wrap(model(torch.float32, tied=False), ctx, plan=plan)
    opt = faccel.wrap_optimizer(sgd(net), net, ctx)
    options = {} if scale is None else {"scale": scale}
    scaler = faccel.init_scaler(ctx, **options)
    losses, infos = [], []
    for gain, batch in zip(gains_of(overflow_at), batches(ctx.device), strict=True):
        loss = loss_of(net(batch[:, :-1]), batch[:, 1:]) * gain
        scaler = faccel.scaled_backward(loss, scaler, ctx)
        info, scaler = faccel.optimizer_step(opt, scaler, ctx, clip_norm=CLIP_NORM)
        losses.append(loss.detach())
        infos.append(info)
    norms = [info.grad_norm for info in infos]
    return losses, list(net.parameters()), norms, scaler, infos


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def assert_same(actual, expected, tolerance=0.0):
    """Raise unless the losses, parameters and norms of two trainings are equal."""
    pairs = []
    for values, expected_values in zip(actual[:3], expected[:3], strict=True):
        pairs += zip(values, expected_values, strict=True)
    for tensor, reference in pairs:
        values, reference_values = full(tensor).detach().cpu(), full(reference).detach().cpu()
        torch.testing.assert_close(values, reference_values, rtol=tolerance, atol=tolerance)
