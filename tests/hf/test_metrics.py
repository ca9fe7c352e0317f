"""torchmetrics and evaluate on gathered rows: each sample of the dataset once, on every rank."""

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
        integer = datasets.Value("int64")
        features = datasets.Features({"predictions": integer, "references": integer})
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
        yield tuple(tensor[: batch.num_valid] for tensor in batch.data)


def gathered(ctx):
    """Yield the scores and targets of all ranks, on every rank."""
    for batch in faccel.batches(faccel.shard(DataLoader(TensorDataset(*rows()), 4), ctx)):
        yield faccel.gather(tuple(batch.data), ctx, num_valid=batch.num_valid)


def metrics(**options):
    options_of_classes = {"num_classes": 3, **options}
    by_name = {
        "accuracy": torchmetrics.Accuracy("multiclass", **options_of_classes),
        "auroc": torchmetrics.AUROC("multiclass", **options_of_classes),
        "confusion": torchmetrics.ConfusionMatrix("multiclass", **options_of_classes),
        "loss": torchmetrics.MeanMetric(**options),
    }
    return torchmetrics.MetricCollection(by_name)


@pytest.mark.parametrize("sync", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_torchmetrics_counts_each_row_once_on_every_rank(world_size, sync):
    """With `sync_on_compute` a rank updates with its valid rows, otherwise with gathered rows."""
    expected = metrics()(preds=rows()[0], target=rows()[1], value=torch.tensor(1.0))

    def fn(ctx):
        collection = metrics(sync_on_compute=sync)
        for scores, targets in valid(ctx) if sync else gathered(ctx):
            collection.update(preds=scores, target=targets, value=torch.ones(len(scores)))
        return collection.compute()

    for result in simulate(fn, world_size):
        assert result["confusion"].sum() == 23
        assert all(
            torch.allclose(result[name], value, atol=1e-6) for name, value in expected.items()
        )


def test_a_metric_of_evaluate_counts_each_row_once(tmp_path):
    """The metric is a local script, because `evaluate.load` downloads those of the hub."""
    (tmp_path / "accuracy.py").write_text(SCRIPT)

    def fn(ctx):
        metric = evaluate.load(
            str(tmp_path / "accuracy.py"), experiment_id=f"rank{ctx.rank}", cache_dir=str(tmp_path)
        )
        for scores, targets in gathered(ctx):
            metric.add_batch(predictions=scores.argmax(-1), references=targets)
        return metric.compute()

    scores, targets = rows()
    accuracy = (scores.argmax(-1) == targets).float().mean().item()
    for result in simulate(fn, 2):
        assert result == {"accuracy": pytest.approx(accuracy), "rows": 23}
