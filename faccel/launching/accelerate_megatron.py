"""Converts Accelerate's section for Megatron-LM to a mesh, arguments of `Plan` and advice."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import attrs

from faccel.launching.accelerate_plan import Arguments, is_true, whole_number

SECTION = "megatron_lm_config"
_PREFIX = "megatron_lm_"
_AXES: Mapping[str, str] = {
    "tp_degree": "tp",
    "pp_degree": "pp",
    "context_parallel_size": "cp",
    "expert_model_parallel_size": "ep",
}
# Whether a value needs nothing, because faccel does the same without an option.
_NOTHING_FOR: Mapping[str, Callable[[Any], bool]] = {
    "use_precision_aware_optimizer": lambda value: not is_true(value),
    "overlap_cpu_optimizer_d2h_h2d": lambda value: not is_true(value),
    # Selective: Megatron-LM computes the attention matrix again. `scaled_dot_product_attention`
    # never stores it.
    "recompute_activations": lambda value: True,
    "recompute_method": lambda value: str(value).lower() == "uniform",
    "recompute_num_layers": lambda value: str(value) == "1",
    "recompute_granularity": lambda value: str(value).lower() in ("full", "selective"),
    "attention_backend": is_true,
    "attention_softmax_in_fp32": is_true,  # PyTorch's kernels always do
    "expert_tensor_parallel_size": lambda value: str(value) == "1",
}
_SPLIT = 'faccel.parallel.PipelineConfig(chain=..., split=("blocks.4",))'
# What to write in the script for a value that is not off, by key. `{}` is the value.
_IN_SCRIPT: Mapping[str, str] = {
    "gradient_clipping": "faccel.optimizer_step(opt, scaler, ctx, clip_norm={})",
    "sequence_parallelism": 'faccel.Plan(tensor={{"blocks.*.up": "sequence_colwise", ...}})',
    "calculate_per_token_loss": "faccel.windows(..., weight=num_tokens)",
    "decoder_last_pipeline_num_layers": _SPLIT,
    "eod_mask_loss": "labels of -100 at the ends of documents",
    "no_load_optim": 'a state without "opt" in `faccel.load`',
    "no_save_optim": 'a state without "opt" in `faccel.save`',
    "attention_dropout": "`dropout_p={}` in the attention of the model",
    "hidden_dropout": "`nn.Dropout({})` in the model",
    "use_rotary_position_embeddings": "rotary positions in the model, as in `examples/gpt.py`",
}


@attrs.frozen
class MegatronParts:
    """The parts of a section that faccel has.

    Args:
        mesh: Ranks per axis.
        plan: Arguments of `Plan`, as in `accelerate_plan`.
        grad_accum: Micro-batches per update; None without the key.
        in_script: What to write in the script, by key.
    """

    mesh: Mapping[str, int]
    plan: Arguments
    grad_accum: int | None
    in_script: Mapping[str, str]


def convert_megatron(section: dict[str, Any]) -> MegatronParts:
    """Return the parts of a section that faccel has, and remove their keys.

    Effects: updates section.

    Raises:
        ConfigError: A size is no whole number.

    Examples:
        >>> parts = convert_megatron({"megatron_lm_tp_degree": 2, "megatron_lm_pp_degree": 2})
        >>> parts.mesh
        {'tp': 2, 'pp': 2, 'dp_replicate': -1}
    """
    mesh: dict[str, int] = {}
    for key, axis in _AXES.items():
        size = whole_number(_PREFIX + key, section.pop(_PREFIX + key, None) or 1, minimum=1)
        if size > 1:
            mesh[axis] = size
    key = f"{_PREFIX}num_micro_batches"
    grad_accum = section.pop(key, None)
    if grad_accum is not None:
        grad_accum = whole_number(key, grad_accum, minimum=1)
    plan = _data_parallel(section, mesh)
    if str(section.get(f"{_PREFIX}recompute_granularity")).lower() == "full":
        plan["activation_checkpoint"] = "full"
    in_script = _in_script(section)
    for key, needs_nothing in _NOTHING_FOR.items():
        if needs_nothing(section.get(_PREFIX + key)):
            section.pop(_PREFIX + key, None)
    return MegatronParts(mesh, plan, grad_accum, in_script)


def _data_parallel(section: dict[str, Any], mesh: dict[str, int]) -> Arguments:
    """Add the axis that fills the world to `mesh`, and return the arguments of `Plan` for it."""

    def is_on(key: str) -> bool:
        return is_true(section.pop(_PREFIX + key, False))

    is_sharded = is_on("use_custom_fsdp")
    has_sharded_optimizer = is_on("use_distributed_optimizer")
    plan: Arguments = {}
    if is_on("optimizer_cpu_offload"):
        plan["offload"] = True
    # Experts are divided over the ranks of `dp_shard`, and only shards can be offloaded.
    if is_sharded or plan or "ep" in mesh:
        mesh["dp_shard"] = -1
    elif not mesh and has_sharded_optimizer:
        plan["ddp.shard_optimizer"] = True  # ZeRO-1 of replicas
    elif has_sharded_optimizer:
        # Beside other axes: FSDP2 whose units stay gathered between forward and backward (ZeRO-2).
        mesh["dp_shard"] = -1
        plan["fsdp.reshard_after_forward"] = False
    elif mesh:
        mesh["dp_replicate"] = -1
    return plan


def _in_script(section: dict[str, Any]) -> dict[str, str]:
    """Remove the keys of which the script has the equal; return what to write, by key."""
    advice: dict[str, str] = {}
    for key, text in _IN_SCRIPT.items():
        value = section.pop(_PREFIX + key, None)
        # Switched off, or a probability or a norm of 0.
        if str(value).lower() not in ("none", "false", "no", "0", "0.0"):
            advice[f"{SECTION}.{_PREFIX}{key}"] = text.format(value)
    return advice
