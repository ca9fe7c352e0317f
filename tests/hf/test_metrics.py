"""Metrics of others on gathered rows: exactly the data set, on every rank."""

import evaluate
import pytest
import torch
import torchmetrics
from torch.utils.data import DataLoader, TensorDataset

import faccel
from faccel.testing import simulate

SCRIPT = """
import datasets
import evaluate


class Accuracy(evaluate.Metric):
    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
        return evaluate.MetricInfo(description="", citation="", features=features)

    def _compute(self, predictions, references):
        hits = [p == r for p, r in zip(predictions, references, strict=True)]
        return {"accuracy": sum(hits) / len(hits), "rows": len(hits)}
"""


def rows(num_classes=3):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(23, num_classes, generator=generator), torch.randint(
        num_classes, (23,), generator=generator
    )


def valid(ctx):
    """Yield this rank's scores and targets, batch by batch, without repeats."""
    for batch in faccel.batches(faccel.shard(DataLoader(TensorDataset(*rows()), 4), ctx)):
        yield tuple(part[: batch.num_valid] for part in batch.data)


def gathered(ctx):
    """Yield those of all ranks, on each of them."""
    for batch in faccel.batches(faccel.shard(DataLoader(TensorDataset(*rows()), 4), ctx)):
        yield faccel.gather(tuple(batch.data), ctx, num_valid=batch.num_valid)


def metrics(**options):
    of = {"num_classes": 3, **options}
    named = {
        "accuracy": torchmetrics.Accuracy("multiclass", **of),
        "auroc": torchmetrics.AUROC("multiclass", **of),
        "confusion": torchmetrics.ConfusionMatrix("multiclass", **of),
        "loss": torchmetrics.MeanMetric(**options),
    }
    return torchmetrics.MetricCollection(named)


@pytest.mark.parametrize("sync", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_torchmetrics_sees_each_row_once_on_every_rank(world_size, sync):
    """It adds up over the ranks itself: so it is given each rank's own valid rows, or told not to."""
    expected = metrics()(preds=rows()[0], target=rows()[1], value=torch.tensor(1.0))

    def fn(ctx):
        own = metrics(sync_on_compute=sync)
        for scores, targets in valid(ctx) if sync else gathered(ctx):
            own.update(preds=scores, target=targets, value=torch.ones(len(scores)))
        return own.compute()

    for found in simulate(fn, world_size):
        assert found["confusion"].sum() == 23
        assert all(
            torch.allclose(found[name], value, atol=1e-6) for name, value in expected.items()
        )


def test_a_metric_of_evaluate_sees_each_row_once(tmp_path):
    """From a script of one's own: those of the hub are programs that are downloaded."""
    (tmp_path / "own.py").write_text(SCRIPT)

    def fn(ctx):
        metric = evaluate.load(
            str(tmp_path / "own.py"), experiment_id=f"rank{ctx.rank}", cache_dir=str(tmp_path)
        )
        for scores, targets in gathered(ctx):
            metric.add_batch(predictions=scores.argmax(-1), references=targets)
        return metric.compute()

    scores, targets = rows()
    accuracy = (scores.argmax(-1) == targets).float().mean().item()
    for found in simulate(fn, 2):
        assert found == {"accuracy": pytest.approx(accuracy), "rows": 23}
