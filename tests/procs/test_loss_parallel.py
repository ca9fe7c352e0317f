"""Loss parallel in real processes, because PyTorch registers it for the whole process."""

import pytest

import faccel
from tests.models import TENSOR, loss_of, model, tokens
from tests.ranks import run_ranks
from tests.training import full

PLAN = faccel.Plan(units="Block", tensor=TENSOR | {"head": "colwise_loss"})


def step(ctx):
    wrapped = faccel.wrap(model(tied=False), ctx, plan=PLAN)
    batch = tokens(4)
    with faccel.parallel.loss_parallel(ctx):
        logits = wrapped(batch[:, :-1])
        loss = loss_of(logits, batch[:, 1:])
        faccel.scaled_backward(loss, faccel.init_scaler(ctx), ctx)
    grads = {name: full(p.grad).numpy() for name, p in wrapped.named_parameters()}
    return logits.to_local().shape[-1], full(loss).item(), grads


@pytest.mark.filterwarnings("ignore")
def test_no_rank_ever_has_all_logits():
    net = model(tied=False)
    expected = loss_of(net(tokens(4)[:, :-1]), tokens(4)[:, 1:])
    expected.backward()
    grads = {name: p.grad.numpy() for name, p in net.named_parameters()}
    for width, loss, local_grads in run_ranks(step, 2, mesh="tp=2"):
        assert width == 16
        assert abs(loss - expected.item()) < 1e-12
        assert all(abs(local_grads[name] - grad).max() < 1e-12 for name, grad in grads.items())
