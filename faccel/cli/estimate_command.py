"""The command `faccel estimate MODEL`."""

from __future__ import annotations

import click

from faccel.cli.output import json_option, present


@click.command()
@click.argument("model")
@click.option(
    "--dtype",
    type=click.Choice(["fp32", "bf16", "fp16", "int8", "int4"]),
    help="Of the weights in memory, with int8 and int4 those of linear layers. Without it, the "
    "dtype of the model.",
)
@json_option
def estimate(model: str, *, dtype: str | None, as_json: bool) -> None:
    """Print how much memory MODEL needs to load, to infer and to train, without loading it.

    MODEL is a folder with config.json of transformers, a folder or a file of safetensors, or
    `module:callable`, such as `train:build_model`. Activations need memory besides.
    """
    import attrs

    # Imports torch: `faccel --help` does not.
    from faccel.inference.budget import size_text
    from faccel.inference.size_estimate import estimate as estimate_size

    # Nothing is loaded, so that a laptop can estimate a model of a cluster.
    size = estimate_size(model, dtype)
    rows = [
        ("parameters", f"{size.num_params:,}"),
        ("largest unit", f"{size.largest_unit}, {size_text(size.largest_unit_bytes)}"),
        ("load, infer", size_text(size.load_bytes)),
    ]
    # Quantized weights are neither read from disk in each forward, nor trained.
    if dtype not in ("int8", "int4"):
        rows += [
            ("infer from disk", f"{size_text(size.offload_bytes)} or more"),
            ("train with AdamW", size_text(size.train_bytes)),
        ]
    present(attrs.asdict(size), rows, as_json=as_json)
