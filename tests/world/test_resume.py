"""`examples/resume.py`: interrupted and resumed after any step, it is the same run."""

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


def check_interrupted_run(tmp_path, stops, world_size, config):
    """Check that a run that is stopped after each of `stops` ends as one that is not."""
    uninterrupted = simulate(run, world_size, tmp_path / "uninterrupted", config=config)
    assert len(set(uninterrupted)) == 1
    folder = tmp_path / "interrupted"
    for stop_after in stops:
        stopped = simulate(run, world_size, folder, stop_after, config=config)
        assert stopped == (None,) * world_size
    assert simulate(run, world_size, folder, config=config) == uninterrupted


def test_a_run_interrupted_in_both_epochs_is_the_same_run(tmp_path):
    check_interrupted_run(tmp_path, (3, 5, 8), 2, FP16)  # 5 is the end of the first epoch


@pytest.mark.slow
@pytest.mark.parametrize("config", [None, FP16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_interrupted_after_every_step_is_the_same_run(tmp_path, world_size, config):
    check_interrupted_run(tmp_path / "every", range(1, NUM_STEPS), world_size, config)
    for stop_after in range(1, NUM_STEPS):
        check_interrupted_run(tmp_path / str(stop_after), [stop_after], world_size, config)


def start(ctx, folder, stop_after=None):
    return run(ctx, folder, stop_after, workers=2)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_interrupted_in_processes_with_workers_is_the_same_run(tmp_path, world_size):
    options = {"mixed_precision": "fp16"}
    uninterrupted = run_ranks(start, world_size, str(tmp_path / "uninterrupted"), **options)
    assert uninterrupted == list(simulate(run, world_size, tmp_path / "simulated", config=FP16))
    for stop_after in (1, 4, 5, 8, 9):
        run_ranks(start, world_size, str(tmp_path / "interrupted"), stop_after, **options)
    resumed = run_ranks(start, world_size, str(tmp_path / "interrupted"), **options)
    assert resumed == uninterrupted


def test_four_then_two_then_three_ranks_read_each_sample_once(tmp_path):
    def fn(ctx, stop):
        loader = faccel.shard(DataLoader(range(100), 24 // ctx.data_world_size, shuffle=True), ctx)
        state = {"cursor": faccel.Cursor(), "step": 0}
        if faccel.latest(tmp_path, ctx):
            state = faccel.load(state, tmp_path, ctx)
        step, seen = state["step"], []
        for _, epoch_loader in loader.epochs(1, start=state["cursor"]):
            for batch in faccel.batches(epoch_loader):
                seen += batch.data[: batch.num_valid].tolist()
                step += 1
                if step == stop:
                    faccel.save({"cursor": batch.cursor, "step": step}, tmp_path, ctx, step=step)
                    return seen
        return seen

    samples = []
    for world_size, stop in ((4, 1), (2, 3), (3, 99)):
        for seen in simulate(fn, world_size, stop):
            samples += seen
    assert sorted(samples) == list(range(100))


def test_on_another_world_size_the_run_differs_by_rounding_only(tmp_path):
    """Global batches and their order are equal, but gradients are summed in another order."""

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
        for _, epoch_loader in loader.epochs(2, start=state["cursor"]):
            for batch in faccel.batches(epoch_loader):
                scaler = faccel.scaled_backward(model(batch.data).square().mean(), scaler, ctx)
                _, scaler = faccel.optimizer_step(opt, scaler, ctx)
                step += 1
                if step == stop_after:
                    new = {"scaler": scaler, "cursor": batch.cursor, "step": step}
                    faccel.save(state | new, folder, ctx, step=step)
                    return None
        return model.weight.detach().clone()

    torch.manual_seed(0)
    expected = simulate(weights, 1, tmp_path / "one rank", seed=3)[0]
    simulate(weights, 4, tmp_path / "resumed", 5, seed=3)
    simulate(weights, 2, tmp_path / "resumed", 9)
    for weight in simulate(weights, 3, tmp_path / "resumed"):
        assert (weight - expected).abs().max() < 1e-13
