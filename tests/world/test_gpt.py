"""`examples/gpt.py`: the recipe of Megatron-LM is the same training on every mesh."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

import faccel
from faccel.testing import fake_context, simulate
from tests.gpt_example import ALL_OPTIONS, gpt, train

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # PyTorch's advice on layouts
]
CONFIG = {"grad_accum": 2}
# The options and the meshes of 2 and 4 ranks on which they are compared with one process.
MESHES = {
    (): ("dp_replicate=2", "tp=2", "pp=2,dp_replicate=2"),
    ("--sequence-parallel",): ("tp=4", "dp_replicate=2,tp=2"),
    ("--tied", "--activation-checkpoint"): ("dp_shard=2", "pp=2", "dp_replicate=2,dp_shard=2"),
    ALL_OPTIONS: ("dp_shard=2,tp=2", "pp=2,tp=2", "pp=2,dp_shard=2"),
}
ROWS = [(options, mesh) for options, meshes in MESHES.items() for mesh in meshes]


def run(mesh, *words):
    size = faccel.MeshSpec.of(mesh).size
    return simulate(lambda ctx: train(ctx, *words), size, mesh=mesh, config=CONFIG)


@functools.lru_cache
def one_process(*words):
    (result,) = run("dp_replicate=1", *words)
    return result


def plain_torch(*, tied, rotary):
    """The loss and the norm of the last of two updates in PyTorch, from the same batches."""
    ctx = fake_context(0, 1)
    loader = faccel.shard(DataLoader(gpt.Text(), 2 * gpt.MICRO_BATCH, shuffle=True), ctx)
    faccel.seed_everything(0, ctx)
    net = gpt.GPT(rotary=rotary, tied=tied, depth=2).double()
    decayed = [param for param in net.parameters() if param.ndim > 1]
    others = [param for param in net.parameters() if param.ndim == 1]
    opt = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": others}])
    opt.param_groups[1]["weight_decay"] = 0.0
    for step, tokens in zip(range(2), loader.at(0), strict=False):
        for group in opt.param_groups:
            group |= {"lr": 3e-3 * (step + 1) / 5, "betas": (0.9, 0.95)}
        opt.zero_grad()
        loss = F.cross_entropy(net(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        opt.step()
    return loss.item(), norm.item()


@pytest.mark.parametrize("options", MESHES)
def test_one_process_equals_plain_torch(options):
    expected = plain_torch(tied="--tied" in options, rotary="learned" not in options)
    assert one_process("--dtype", "float64", *options) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize(("options", "mesh"), ROWS)
def test_loss_and_norm_equal_one_process_on_every_mesh(options, mesh):
    for dtype, near in (("float64", 1e-10), ("float32", 1e-5)):
        words = ("--dtype", dtype, *options)
        for result in run(mesh, *words):
            assert result == pytest.approx(one_process(*words), abs=near)


@pytest.mark.parametrize(
    ("first", "second"), [("tp=2", "pp=2"), ("pp=2,tp=2", "dp_replicate=2"), ("dp_shard=2", "tp=2")]
)
def test_a_run_resumes_on_another_mesh(first, second, tmp_path):
    words = ("--dtype", "float64", *ALL_OPTIONS)
    run(first, *words, "--runs", str(tmp_path))
    resumed = run(second, *words, "--runs", str(tmp_path), "--steps", "3")
    for result in resumed:
        assert result == pytest.approx(one_process(*words, "--steps", "3"), abs=1e-10)
    with pytest.raises(faccel.errors.ConfigError, match="no update is left"):
        run(second, *words, "--runs", str(tmp_path), "--steps", "3")


def test_bf16_is_close_to_fp32():
    (expected, _) = one_process()
    for loss, _ in simulate(train, 2, mesh="tp=2", config=CONFIG | {"mixed_precision": "bf16"}):
        assert loss != expected and abs(loss - expected) < 0.02


def test_the_learning_rate_warms_up_and_follows_a_cosine():
    rates = [gpt.LEARNING_RATE * gpt.learning_rate(step) for step in range(gpt.DECAY_STEPS + 9)]
    assert rates[0] == pytest.approx(gpt.LEARNING_RATE / gpt.WARMUP)
    assert max(rates) == rates[gpt.WARMUP - 1] == rates[gpt.WARMUP] == gpt.LEARNING_RATE
    middle = (gpt.WARMUP + gpt.DECAY_STEPS) / 2
    mean = (gpt.LEARNING_RATE + gpt.MIN_LEARNING_RATE) / 2
    assert gpt.LEARNING_RATE * gpt.learning_rate(middle) == pytest.approx(mean)
    assert rates[-1] == pytest.approx(gpt.MIN_LEARNING_RATE)
