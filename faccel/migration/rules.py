"""The members of `Accelerator`, and the functions of accelerate, that one expression replaces."""

from __future__ import annotations

from collections.abc import Mapping

import attrs

DOCS = "docs/coming-from-accelerate.md"


@attrs.frozen
class CallRule:
    """How a call of Accelerate becomes one call of faccel.

    Args:
        function: What to call.
        params: Parameters of Accelerate's function, in order.
        positional: How many of them stay positional; `ctx` follows them.
        keywords: The names of further parameters in faccel.
        dropped: Parameters that faccel has no use for.
        context: How the context is passed: "ctx", "ctx=ctx", or "" for not at all.
        extra: Further arguments, as code.
        around: What surrounds the call.
        note: What differs; empty if nothing does.
    """

    function: str
    params: tuple[str, ...] = ()
    positional: int = 0
    keywords: Mapping[str, str] = attrs.field(factory=dict)
    dropped: tuple[str, ...] = ()
    context: str = "ctx"
    extra: str = ""
    around: str = "{call}"
    note: str = ""


# `{ctx}` is the context of the accelerator that the attribute belongs to.
ATTRIBUTES = {
    "device": "{ctx}.device",
    "gradient_accumulation_steps": "{ctx}.config.grad_accum",
    "is_last_process": "({ctx}.rank == {ctx}.world_size - 1)",
    "is_local_main_process": "{ctx}.is_local_main",
    "is_main_process": "{ctx}.is_main",
    "local_process_index": "{ctx}.local_rank",
    "logging_dir": "{ctx}.config.run_dir",
    "mixed_precision": "{ctx}.config.mixed_precision",
    "num_processes": "{ctx}.world_size",
    "on_local_main_process": "faccel.comm.on_local_main({ctx})",
    "on_main_process": "faccel.on_main({ctx})",
    "process_index": "{ctx}.rank",
    "project_dir": "{ctx}.config.run_dir",
    "should_save_model": "True",
    "state": "{ctx}",
    "torch_device_mesh": "{ctx}.mesh.device_mesh",
    "use_distributed": "({ctx}.world_size > 1)",
}

METHODS = {
    "autocast": CallRule("faccel.autocast", ("autocast_handler",)),
    "destroy_process_group": CallRule("faccel.shutdown"),
    "gather": CallRule("faccel.gather", ("tensor",), 1),
    "get_state_dict": CallRule(
        "faccel.unwrap",
        ("model", "unwrap"),
        1,
        dropped=("unwrap",),
        context="",
        around="{call}.state_dict()",
        note="with sharded parameters, `faccel.checkpoint.export_model` writes full weights; "
        "docs/checkpoints.md#export",
    ),
    "local_main_process_first": CallRule("faccel.main_first", extra="local=True"),
    "main_process_first": CallRule("faccel.main_first"),
    "no_sync": CallRule("faccel.grad_sync", ("model",), 1, context="", extra="on=False"),
    "on_local_main_process": CallRule("faccel.comm.on_local_main", ()),
    "on_main_process": CallRule("faccel.on_main", ()),
    "on_process": CallRule(
        "faccel.on_rank", ("function", "process_index"), keywords={"process_index": ""}
    ),
    "pad_across_processes": CallRule(
        "faccel.comm.pad_across",
        ("tensor", "dim", "pad_index", "pad_first"),
        1,
        {"dim": "dim", "pad_index": "value", "pad_first": "first"},
    ),
    "print": CallRule("faccel.print", context="ctx=ctx"),
    "reduce": CallRule("faccel.reduce", ("tensor", "reduction", "scale"), 1, {"reduction": "op"}),
    "save": CallRule(
        "faccel.checkpoint.save_object",
        ("obj", "f", "safe_serialization"),
        2,
        note="reads like `torch.save`; call it on every rank; see docs/checkpoints.md",
    ),
    "save_model": CallRule(
        "faccel.checkpoint.export_model",
        ("model", "save_directory", "max_shard_size", "safe_serialization"),
        2,
        {"max_shard_size": "max_shard_size"},
        dropped=("safe_serialization",),
    ),
    "unwrap_model": CallRule(
        "faccel.unwrap",
        ("model", "keep_fp32_wrapper", "keep_torch_compile"),
        1,
        dropped=("keep_fp32_wrapper", "keep_torch_compile"),
        context="",
    ),
    "wait_for_everyone": CallRule("faccel.barrier"),
}

# Functions of `accelerate` and `accelerate.utils` that need a context.
FUNCTIONS = {
    "broadcast": CallRule(
        "faccel.broadcast", ("tensor", "from_process"), 1, {"from_process": "src"}
    ),
    "gather": METHODS["gather"],
    "gather_object": CallRule(
        "faccel.gather_objects",
        ("object",),
        1,
        around="[item for items in {call} for item in items]",
    ),
    "pad_across_processes": METHODS["pad_across_processes"],
    "set_seed": CallRule(
        "faccel.seed_everything",
        ("seed", "device_specific"),
        1,
        {"device_specific": "per_data_rank"},
    ),
    "wait_for_everyone": METHODS["wait_for_everyone"],
}

# Comparisons of `distributed_type` with these are questions about the context.
DISTRIBUTED_TYPES = {
    "DEEPSPEED": '{ctx}.config.strategy == "deepspeed"',
    "FSDP": "{ctx}.mesh.spec.dp_shard > 1",
    "MEGATRON_LM": "False",
    "MULTI_CPU": '({ctx}.world_size > 1 and str({ctx}.device).startswith("cpu"))',
    "MULTI_GPU": '({ctx}.world_size > 1 and str({ctx}.device).startswith("cuda:"))',
    "NO": "{ctx}.world_size == 1",
    "TPU": 'str({ctx}.device).startswith(("tpu", "xla"))',
    "XLA": 'str({ctx}.device).startswith(("tpu", "xla"))',
}

# Functions and classes of accelerate without an equal, and what replaces them.
NAMES_WITHOUT_EQUAL = {
    "LocalSGD": "`faccel.parallel.local_sgd(model, ctx, step=n, every=8)`; see docs/parallelism.md",
    "dispatch_model": "`faccel.inference.place(model, path, ctx)`; see docs/inference.md",
    "init_empty_weights": "`faccel.inference.on_meta()`; see docs/inference.md",
    "load_and_quantize_model": "`faccel.inference.load_quantized(model, path, ctx)`; see "
    "docs/inference.md",
    "load_checkpoint_and_dispatch": "`faccel.inference.place(model, path, ctx)`; see "
    "docs/inference.md",
    "notebook_launcher": "`faccel.notebook_launch(fn)` calls `fn(ctx)`; see docs/launching.md",
    "prepare_pippy": '`mesh="pp=2"`; see docs/parallelism.md',
}

# Members that statements and loops replace: `updates`, `loops`, `statements` and `prepared`.
REWRITTEN = frozenset(
    {
        "accumulate",
        "backward",
        "check_trigger",
        "clear",
        "clip_grad_norm_",
        "clip_grad_value_",
        "end_training",
        "free_memory",
        "gather_for_metrics",
        "init_trackers",
        "load_state",
        "log",
        "optimizer_step_was_skipped",
        "prepare",
        "prepare_data_loader",
        "prepare_model",
        "prepare_optimizer",
        "prepare_scheduler",
        "register_for_checkpointing",
        "save_state",
        "set_trigger",
        "skip_first_batches",
        "split_between_processes",
        "sync_gradients",
        "unscale_gradients",
    }
)

# Members without an equal, and where the docs have what replaces them.
WITHOUT_EQUAL = {
    "accumulate": "docs/accumulation.md",
    "backward": "docs/training-loop.md",
    "clip_grad_norm_": "docs/training-loop.md#one-update",
    "clip_grad_value_": "docs/training-loop.md#one-update",
    "prepare": "docs/training-loop.md#models-and-optimizers",
    "sync_gradients": "docs/accumulation.md",
    "deepspeed_plugin": "docs/deepspeed.md",
    "deepspeed_ulysses_dl_adapter": "docs/parallelism.md",
    "distributed_type": "`ctx.mesh.spec` has the axes; see docs/parallelism.md",
    "fp8_backend": "docs/training-loop.md#mixed-precision",
    "get_tracker": "`faccel.tracking.handle(name, trackers)`; see docs/logging.md#trackers",
    "is_fsdp2": "`ctx.mesh.spec` has the axes; see docs/parallelism.md",
    "join_uneven_inputs": "`faccel.parallel.join(model, opt, ctx)`; see docs/parallelism.md",
    "lomo_backward": "docs/training-loop.md",
    "maybe_context_parallel": "docs/parallelism.md",
    "on_last_process": "`faccel.on_rank(rank, ctx)`; see docs/communication.md#work-of-one-rank",
    "on_local_process": "`faccel.on_rank(rank, ctx)`; see docs/communication.md#work-of-one-rank",
    "profile": "`faccel.tracking.profile(ctx)`; see docs/profiling.md",
    "project_configuration": "docs/logging.md",
    "register_load_state_pre_hook": "`faccel.load` takes a state; see docs/checkpoints.md",
    "register_save_state_pre_hook": "`faccel.save` takes a state; see docs/checkpoints.md",
    "save_iteration": "`step=` of `faccel.save`; see docs/checkpoints.md",
    "scaler": "the loss scale is the value `scaler`; see docs/training-loop.md#mixed-precision",
    "tracker": "docs/logging.md",
    "trackers": "docs/logging.md",
    "trigger_sync_in_backward": "`faccel.grad_sync(model, on=True)`; see docs/accumulation.md",
    "verify_device_map": "docs/parallelism.md",
}

# Members that hardly anything but an accelerator has: they show what an expression holds.
DISTINCTIVE = frozenset(
    {
        "check_trigger",
        "gather_for_metrics",
        "is_local_main_process",
        "is_main_process",
        "prepare",
        "register_for_checkpointing",
        "set_trigger",
        "sync_gradients",
        "unwrap_model",
        "wait_for_everyone",
    }
)


def is_member(name: str) -> bool:
    """Return whether `Accelerator` has a member of this name that the rewriting looks for.

    Effects: pure.
    """
    return name in ATTRIBUTES or name in METHODS or name in REWRITTEN or name in WITHOUT_EQUAL
