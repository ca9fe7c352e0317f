"""`examples/resume.py`: interrupted anywhere and gone on with, it is the same run."""

import pytest
import torch
from torch.utils.data import DataLoader

import faccel
from examples import resume
from faccel.testing import simulate
from tests.ranks import run_ranks

NUM_STEPS = 10  # 2 epochs of 5 updates of 2 x 64 images
FP16 = {"mixed_precision": "fp16"}


def run(ctx, folder, stop_after=None, workers=0):
    return resume.main(ctx, folder, stop_after, workers)


@pytest.mark.parametrize("config", [None, FP16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_interrupted_after_every_single_step(tmp_path, world_size, config):
    whole = simulate(run, world_size, tmp_path / "whole", config=config)
    assert len(set(whole)) == 1
    for stop_after in range(1, NUM_STEPS):  # once, at each step
        folder = tmp_path / f"at-{stop_after}"
        assert simulate(run, world_size, folder, stop_after, config=config) == (None,) * world_size
        assert simulate(run, world_size, folder, config=config) == whole
    for stop_after in range(1, NUM_STEPS):  # one run, after every step of it
        assert (
            simulate(run, world_size, tmp_path / "all", stop_after, config=config)
            == (None,) * world_size
        )
    assert simulate(run, world_size, tmp_path / "all", config=config) == whole


def start(ctx, folder, stop_after=None):
    return run(ctx, folder, stop_after, workers=2)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_interrupted_in_processes_with_workers(tmp_path, world_size):
    options = {"mixed_precision": "fp16"}
    whole = run_ranks(start, world_size, str(tmp_path / "whole"), **options)
    assert whole == list(simulate(run, world_size, tmp_path / "simulated", config=FP16))
    for stop_after in (1, 4, 5, 8, 9):
        run_ranks(start, world_size, str(tmp_path / "all"), stop_after, **options)
    assert run_ranks(start, world_size, str(tmp_path / "all"), **options) == whole


def test_four_then_two_then_three_ranks_see_each_sample_once(tmp_path):
    def fn(ctx, stop):
        loader = faccel.shard(DataLoader(range(100), 24 // ctx.data_world_size, shuffle=True), ctx)
        state = {"cursor": faccel.Cursor(), "step": 0}
        if faccel.latest(tmp_path, ctx):
            state = faccel.load(state, tmp_path, ctx)
        step, seen = state["step"], []
        for _, part in loader.epochs(1, start=state["cursor"]):
            for batch in faccel.batches(part):
                seen += batch.data[: batch.num_valid].tolist()
                step += 1
                if step == stop:
                    faccel.save({"cursor": batch.cursor, "step": step}, tmp_path, ctx, step=step)
                    return seen
        return seen

    samples = [
        x
        for world_size, stop in ((4, 1), (2, 3), (3, 99))
        for part in simulate(fn, world_size, stop)
        for x in part
    ]
    assert sorted(samples) == list(range(100))


def test_on_another_world_size_the_run_differs_by_rounding_alone(tmp_path):
    """The global batch is the same, so are samples and their order; gradients are summed in another order."""

    def weights(ctx, folder, stop_after=None):
        torch.set_default_dtype(torch.float32)
        model = faccel.wrap(torch.nn.Linear(4, 1).double(), ctx)
        opt = faccel.wrap_optimizer(torch.optim.AdamW(model.parameters(), 0.05), model, ctx)
        data = torch.randn(96, 4, generator=faccel.random.generator(0), dtype=torch.float64)
        loader = faccel.shard(DataLoader(data, 12, shuffle=True), ctx, split_batches=True)
        state = {
            "model": model,
            "opt": opt,
            "scaler": faccel.init_scaler(ctx),
            "cursor": faccel.Cursor(),
            "step": 0,
        }
        if faccel.latest(folder, ctx):
            state = faccel.load(state, folder, ctx)
        scaler, step = state["scaler"], state["step"]
        for _, part in loader.epochs(2, start=state["cursor"]):
            for batch in faccel.batches(part):
                scaler = faccel.scaled_backward(model(batch.data).square().mean(), scaler, ctx)
                _, scaler = faccel.optimizer_step(opt, scaler, ctx)
                step += 1
                if step == stop_after:
                    new = {"scaler": scaler, "cursor": batch.cursor, "step": step}
                    faccel.save(state | new, folder, ctx, step=step)
                    return None
        return model.weight.detach().clone()

    torch.manual_seed(0)
    whole = simulate(weights, 1, tmp_path / "whole", seed=3)[0]
    simulate(weights, 4, tmp_path / "parts", 5, seed=3)
    simulate(weights, 2, tmp_path / "parts", 9)
    resumed = simulate(weights, 3, tmp_path / "parts")
    assert all((w - whole).abs().max() < 1e-13 for w in resumed)
