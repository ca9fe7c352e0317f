"""Situations that users reported: each with its neighbours, the values that must come out, a row.

A row of `CASES` is a situation, as a user's script had it. Its `Check` functions compare with plain
PyTorch on one process, with arithmetic, or with a peer. Conditions are a world, an optimizer, ...
"""

import itertools
from collections.abc import Callable, Sequence

import attrs
import pytest

from faccel.config import config_fields
from tests.cases import loaders, precision, replicas, settings, sharded, stored

# Warnings of PyTorch: on layouts, at the first import of Inductor, while Dynamo traces.
pytestmark = pytest.mark.filterwarnings("ignore")


@attrs.frozen
class Check:
    """A function and the conditions under which it runs.

    Args:
        fn: Called with a temporary folder and the words of a condition.
        conditions: Tuples of words.
    """

    fn: Callable[..., None]
    conditions: Sequence[tuple[str, ...]]


def check(fn, *words):
    """Return a check under all combinations of the words, which `|` separates."""
    return Check(fn, list(itertools.product(*(text.split("|") for text in words))))


def low_precision(worlds, models, precisions="bf16|fp16", plans="default"):
    """Return a check of models in a low precision."""
    return check(precision.low_precision, worlds, models, precisions, plans)


# What starts processes, needs four sharded ranks, or takes seconds.
SLOW = {
    "ddp-gloo", "fsdp-gloo", "hsdp", "pp-fsdp", "workers", "plain", "part", "nested",
    "gpt2", "bert", settings.a_compiled_model,
}  # fmt: skip
SHARDED = "fsdp|fsdp-root|hsdp|fsdp-gloo"
REPLICAS = "ddp|ddp-3|ddp-4|ddp-gloo"
GLOO = "ddp-gloo|fsdp-gloo"
ROOTS = "single|ddp|fsdp-root|hsdp"
ALL = "single|ddp|zero-1|fsdp|fsdp-root|hsdp|tp|cp|pp|pp-fsdp|ddp-gloo|fsdp-gloo"
CASES = {
    "baseline_eval": [
        check(sharded.an_evaluation_before_the_optimizer, ALL, "SGD", "no_grad"),
        check(
            sharded.an_evaluation_before_the_optimizer,
            "ddp|fsdp|hsdp", "SGD", "inference_mode|with gradients",
        ),
    ],
    "batch_sampler_gather": [
        check(
            loaders.an_exact_gather,
            "single|ddp|ddp-4",
            "map|sampler|batch_sampler|ragged|items|stream|batches|texts",
            "default|full|debug",
        ),
        check(loaders.an_exact_gather, "single|ddp|ddp-4", "stream|batches|texts", "dispatch"),
        check(
            loaders.an_exact_gather,
            "single|ddp|ddp-4", "map|sampler|batch_sampler|ragged|stream", "split_batches",
        ),
        check(loaders.an_exact_gather, "ddp-gloo", "batch_sampler|ragged|stream|texts", "default"),
    ],
    "compile_nothing": [
        check(
            settings.a_plan_that_compiles_nothing,
            "single|ddp|fsdp-root", "units", "loop|loop without compiler",
        ),
        check(
            settings.a_plan_that_compiles_nothing,
            "single|ddp|fsdp-root", "whole", "loop without compiler",
        ),
        # The hooks of FSDP2 break the graph of a loop.
        check(settings.a_plan_that_compiles_nothing, "fsdp-root", "whole", "loop"),
        check(
            settings.a_compiled_model,
            "single|ddp|fsdp-root", "TransformerEncoder|blocks", "units|whole",
        ),
        check(settings.a_compiled_model, "single|ddp|fsdp-root", "Sequential", "whole"),
    ],
    "compiled_before_wrap": [
        check(
            stored.a_model_compiled_before_wrap, "ddp|fsdp-root", "plain|compiled|part|nested"
        )
    ],
    "compiled_export": [
        check(stored.an_export_for_from_pretrained, "single|fsdp-root", "llama", "whole"),
        check(stored.an_export_for_from_pretrained, "single", "llama|gpt2|bert", "part"),
        check(stored.an_export_for_from_pretrained, "single", "gpt2|bert", "whole"),
    ],
    "complex_ckpt": [
        check(
            stored.a_complex_parameter,
            "ddp|fsdp-root|hsdp", "ddp|fsdp-root|hsdp", "complex64|complex128",
        ),
        check(stored.a_complex_parameter, "fsdp-gloo", "ddp", "complex64"),
    ],
    "ddp_diverges": [
        check(
            replicas.a_change_after_wrap,
            "single|ddp|ddp-4", "unfreeze|add_layer|replace_layer|reinitialize|cast|freeze",
        ),
        check(replicas.a_change_after_wrap, "ddp-gloo", "unfreeze|add_layer"),
        check(replicas.a_criterion_with_parameters, "single|ddp|ddp-3"),
    ],
    "ema_fsdp": [
        check(sharded.averages_of_parameters, ALL, "SGD"),
        check(sharded.averages_of_parameters, "zero-1|fsdp", "momentum|AdamW"),
    ],
    "eval_on_main_only": [
        check(replicas.an_evaluation_on_one_rank, REPLICAS, "rank 0|rank 1"),
    ],
    "eval_then_save": [
        check(
            sharded.an_evaluation_around_a_save,
            ALL, "train evaluate save restart load train", "AdamW",
        ),
        check(
            sharded.an_evaluation_around_a_save,
            "ddp|fsdp|hsdp",
            "train save restart load train|train save evaluate load train|"
            "train evaluate background restart load evaluate train",
            "momentum",
        ),
    ],
    "fsdp_bf16_buffers": [
        low_precision("ddp|fsdp-root|hsdp", "positions|kernel"),
        low_precision("ddp|fsdp-root", "batch norm", plans="default|fp32_units|fp32_units of all"),
    ],
    "fsdp_bf16_inputs": [
        low_precision("ddp|fsdp-root|hsdp", "float inputs|a block in fp32"),
        low_precision("fsdp-gloo", "float inputs|a block in fp32", "bf16"),
    ],
    "generator_ignored": [
        check(
            loaders.a_seeded_generator,
            "single|ddp|ddp-4", "shuffle|random sampler|replacement|weighted|batch sampler",
        )
    ],
    "grad_hook": [
        check(
            sharded.a_hook_of_a_parameter,
            "single|ddp|fsdp|fsdp-root|hsdp|cp", "tensor hook|post-accumulate hook", "SGD",
        ),
        check(sharded.a_hook_of_a_parameter, "ddp|fsdp", "tensor hook", "momentum"),
        check(sharded.a_hook_of_a_parameter, GLOO, "tensor hook", "SGD"),
    ],
    "half_loaded": [
        check(
            stored.a_load_that_fails,
            ROOTS, "another shape|a layer more|another name|another class",
        ),
        check(stored.a_load_of_a_complex_model, ROOTS),
    ],
    "helper_on_main": [
        check(
            replicas.a_method_on_the_main_rank,
            "ddp|ddp-3|fsdp-root|hsdp|ddp-gloo|fsdp-gloo", "num_parameters",
        ),
        check(replicas.a_method_on_the_main_rank, "ddp|ddp-3", "eval|train"),
    ],
    "holder": [
        check(sharded.a_wrapped_model_inside_a_module, ROOTS, "attribute|list|dict|module")
    ],
    "import_drops_deepspeed": [check(settings.a_file_of_accelerate, "DeepSpeed|FSDP|dynamo")],
    "lowbit_state": [
        check(stored.a_low_bit_optimizer, "single|ddp|fsdp-root", "AdamW8bit|AdamW4bit|AdamWFp8")
    ],
    "meta": [
        check(
            sharded.a_model_on_meta,
            "single|ddp|fsdp-root|hsdp|tp|ddp-gloo|fsdp-gloo", "every rank|all but rank 0",
        )
    ],
    "none_means_not_given": [
        check(settings.none_for_a_field, "|".join(field.name for field in config_fields()))
    ],
    "one_process_pads": [Check(loaders.the_last_batch, list(loaders.READ))],
    "optimizer_after_eval": [
        check(
            sharded.an_evaluation_before_the_optimizer,
            SHARDED, "momentum|AdamW|RMSprop|Adagrad", "no_grad",
        )
    ],
    "partial_load": [
        check(
            stored.a_part_of_a_checkpoint,
            ROOTS, "other head|a layer more|renamed|a key the old run had not",
        ),
        check(stored.tensors_without_a_model, ROOTS),
    ],
    "plan_for_decoder_pp": [
        check(settings.a_pipeline_for_a_model_of_transformers, "llama|gpt2|bert")
    ],
    "presharded": [
        check(
            loaders.data_of_each_rank,
            "stream|map|shuffle|subset|distributed|batch sampler|batches|workers",
            "24|23|13", "1|2|3",
        ),
        check(
            loaders.a_stream_that_a_library_has_split, "auto|local|split|dispatch|shards", "4|3"
        ),
        check(loaders.other_samples_on_each_rank, "length|sample|stream|batches|equal"),
    ],
    "raw_errors": [
        check(sharded.an_idiom_of_torch, "single|ddp|fsdp|hsdp", "|".join(sharded.IDIOMS)),
        check(
            sharded.an_idiom_of_torch,
            GLOO, "full state dict|L2 penalty of full tensors|gradient penalty",
        ),
    ],
    "remote_path": [
        check(
            stored.a_url_for_a_path,
            "|".join(stored.USES),
            "s3://bucket/run|gs://bucket/run|hf://user/model|https://host/run",
        )
    ],
    "save_on_main_only": [
        check(
            replicas.a_collective_on_the_main_rank,
            "ddp|ddp-3|fsdp-root", "save|export|reduce|barrier", "ordinary",
        ),
        check(
            replicas.a_collective_on_the_main_rank,
            "ddp|fsdp-root|ddp-gloo|fsdp-gloo", "save", "debug",
        ),
        check(replicas.a_collective_on_the_main_rank, GLOO, "save|export", "ordinary"),
    ],
    "seed": [
        check(loaders.the_seed_of_the_order, "config|argument|generator"),
        check(loaders.noise_of_ranks, "ddp-4|hsdp|ddp-tp", "equal|per data rank"),
    ],
    "skip_first_batches": [
        check(loaders.skipped_batches, "equal|ragged", "0|1", "1|2"),
        check(loaders.skipped_batches, "equal|ragged", "2", "1"),
    ],
    "sparse_simulated": [
        check(replicas.sparse_tensors, "ddp|ddp-gloo", "all_reduce|gradients")
    ],
    "sync_backward_only": [
        check(
            replicas.forwards_before_the_last_backward,
            "single|ddp|ddp-3|ddp-4|fsdp-root|hsdp|ddp-gloo|fsdp-gloo",
            "scaled_backward|loss.backward",
        )
    ],
    "tracker": [
        check(
            settings.metrics_of_any_type,
            "text|None|list|tensor", "dict|Namespace|SimpleNamespace|dataclass",
        )
    ],
    "two_backwards": [
        check(
            replicas.two_backwards_over_one_forward,
            "single|ddp|ddp-3|fsdp-root|hsdp|ddp-gloo|fsdp-gloo",
            "retain_graph|by hand|by hand, grad_sync off",
        )
    ],
    "unscale": [
        check(replicas.unscaled_gradients, ROOTS, "clip_norm"),
        check(replicas.unscaled_gradients, "single|ddp|ddp-gloo", "by hand"),
    ],
}  # fmt: skip
NAMES = (
    "baseline_eval", "batch_sampler_gather", "compile_nothing", "compiled_before_wrap",
    "compiled_export", "complex_ckpt", "ddp_diverges", "ema_fsdp", "eval_on_main_only",
    "eval_then_save", "fsdp_bf16_buffers", "fsdp_bf16_inputs", "generator_ignored", "grad_hook",
    "half_loaded", "helper_on_main", "holder", "import_drops_deepspeed", "lowbit_state", "meta",
    "none_means_not_given", "one_process_pads", "optimizer_after_eval", "partial_load",
    "plan_for_decoder_pp", "presharded", "raw_errors", "remote_path", "save_on_main_only", "seed",
    "skip_first_batches", "sparse_simulated", "sync_backward_only", "tracker", "two_backwards",
    "unscale",
)  # fmt: skip


def rows():
    """Return a parameter of the test for each situation and condition."""
    params = []
    for name, checks in CASES.items():
        for entry in checks:
            for condition in entry.conditions:
                marks = [pytest.mark.slow] if SLOW & {entry.fn, *condition} else []
                title = ", ".join((name, *condition))
                params.append(pytest.param(entry.fn, condition, id=title, marks=marks))
    return params


@pytest.mark.parametrize(("fn", "condition"), rows())
def test_a_situation_of_a_user(fn, condition, tmp_path):
    fn(tmp_path, *condition)


def test_every_situation_has_a_row_with_neighbours():
    assert tuple(CASES) == NAMES
    for name, checks in CASES.items():
        assert sum(len(entry.conditions) for entry in checks) >= 3, name
    titles = [param.id for param in rows()]
    assert len(set(titles)) == len(titles)
