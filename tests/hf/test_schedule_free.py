"""Schedule-free optimizers, which swap parameters for evaluation: every layout, checkpoints."""

import pytest
import schedulefree
import torch

import faccel
from faccel.errors import OptimizerError
from faccel.testing import simulate
from tests.hf.models import batch_of, build, full

CLASSES = {
    "adamw": lambda params: schedulefree.AdamWScheduleFree(
        params, lr=1e-2, warmup_steps=2, foreach=False
    ),
    "sgd": lambda params: schedulefree.SGDScheduleFree(params, lr=1e-1, foreach=False),
}


def start(ctx, name, seed=0, plan=None):
    torch.manual_seed(seed)
    net = build("gpt2")
    net.transformer.wpe.weight.data += seed
    model = faccel.wrap(net, ctx, plan=plan)
    opt = faccel.wrap_optimizer(CLASSES[name](model.parameters()), model, ctx)
    opt.train()
    return {"model": model, "opt": opt}


def loss_of(state, ctx, seed):
    loss = state["model"](**faccel.split(batch_of("gpt2", seed=seed), ctx)).loss
    return loss, faccel.reduce(loss.detach(), ctx, op="mean").item()


def run(ctx, name, path=None, mode="train"):
    """Train four updates, with a save and a load after the second if `path` is set.

    Returns losses and gradient norms of training, then the evaluation loss.
    """
    state, values = start(ctx, name), []
    for step in range(4):
        if step == 2 and path:
            getattr(state["opt"], mode)()
            faccel.save(state, path, ctx, step=1)
            state = faccel.load(start(ctx, name, seed=1), path, ctx)
            state["opt"].train()
        loss, mean = loss_of(state, ctx, step)
        scaler = faccel.scaled_backward(loss, faccel.init_scaler(ctx), ctx)
        info, _ = faccel.optimizer_step(state["opt"], scaler, ctx, clip_norm=0.1)
        values += [mean, info.grad_norm.item()]
    trained = full(state["model"].module.lm_head.weight)
    state["opt"].eval()
    assert not torch.equal(full(state["model"].module.lm_head.weight), trained)
    with torch.no_grad():
        return [*values, loss_of(state, ctx, 9)[1]]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [None, "dp_replicate=2", "dp_shard=2"])
@pytest.mark.parametrize("name", sorted(CLASSES))
def test_it_trains_and_evaluates_as_on_one_process_and_resumes_from_either_mode(
    tmp_path, name, mesh
):
    (one,) = simulate(run, 1, name)
    size = faccel.MeshSpec.of(mesh).size if mesh else 1
    for path, mode in ((None, "train"), (tmp_path / "a", "train"), (tmp_path / "b", "eval")):
        for result in simulate(run, size, name, path, mode, mesh=mesh):
            assert max(abs(a - b) for a, b in zip(result, one, strict=True)) < 1e-6


def test_zero_1_for_it_is_an_error_that_suggests_dp_shard():
    plan = faccel.Plan(ddp=faccel.parallel.DdpConfig(shard_optimizer=True))
    with pytest.raises(OptimizerError) as caught:
        simulate(start, 2, "adamw", 0, plan)
    assert "AdamWScheduleFree" in caught.value.got
    assert "dp_shard" in caught.value.fix
