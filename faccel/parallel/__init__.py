"""Building blocks of parallelism, and the records of a `Plan`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from faccel.exports import lazy

if TYPE_CHECKING:
    from faccel.parallel.auto_plan import plan_for as plan_for
    from faccel.parallel.context_parallelism import attention as attention
    from faccel.parallel.context_parallelism import context_parallel as context_parallel
    from faccel.parallel.context_parallelism import split_sequence as split_sequence
    from faccel.parallel.full_params import full_state_dict as full_state_dict
    from faccel.parallel.full_params import gathered as gathered
    from faccel.parallel.moe import MoE as MoE
    from faccel.parallel.recompilations import num_recompilations as num_recompilations
    from faccel.parallel.tensor_parallel import loss_parallel as loss_parallel
    from faccel.parallel.vocab_parallel_loss import cross_entropy as cross_entropy
    from faccel.plan import ActivationCheckpointing as ActivationCheckpointing
    from faccel.plan import Compile as Compile
    from faccel.plan import DdpConfig as DdpConfig
    from faccel.plan import DeepSpeedConfig as DeepSpeedConfig
    from faccel.plan import Fp8 as Fp8
    from faccel.plan import FsdpConfig as FsdpConfig
    from faccel.plan import LayerwiseCasting as LayerwiseCasting
    from faccel.plan import PipelineConfig as PipelineConfig
    from faccel.plan import PowerSgdConfig as PowerSgdConfig
    from faccel.plan_units import TransformerEngineConfig as TransformerEngineConfig
    from faccel.training.diloco import DilocoState as DilocoState
    from faccel.training.diloco import diloco as diloco
    from faccel.training.diloco import init_diloco as init_diloco
    from faccel.training.ema import EmaState as EmaState
    from faccel.training.ema import ema_weights as ema_weights
    from faccel.training.ema import init_ema as init_ema
    from faccel.training.ema import update_ema as update_ema
    from faccel.training.join import join as join
    from faccel.training.local_sgd import SyncInfo as SyncInfo
    from faccel.training.local_sgd import averaged as averaged
    from faccel.training.local_sgd import local_sgd as local_sgd
    from faccel.training.memory import empty_cache as empty_cache
    from faccel.training.memory import free_memory as free_memory
    from faccel.training.optimizer_in_backward import step_in_backward as step_in_backward

_NAMES = {
    "faccel.parallel.auto_plan": ("plan_for",),
    "faccel.parallel.context_parallelism": ("attention", "context_parallel", "split_sequence"),
    "faccel.parallel.full_params": ("full_state_dict", "gathered"),
    "faccel.parallel.moe": ("MoE",),
    "faccel.parallel.recompilations": ("num_recompilations",),
    "faccel.parallel.tensor_parallel": ("loss_parallel",),
    "faccel.parallel.vocab_parallel_loss": ("cross_entropy",),
    "faccel.plan": (
        "ActivationCheckpointing", "Compile", "DdpConfig", "DeepSpeedConfig", "Fp8", "FsdpConfig",
        "LayerwiseCasting", "PipelineConfig", "PowerSgdConfig",
    ),
    "faccel.plan_units": ("TransformerEngineConfig",),
    "faccel.training.diloco": ("DilocoState", "diloco", "init_diloco"),
    "faccel.training.ema": ("EmaState", "ema_weights", "init_ema", "update_ema"),
    "faccel.training.join": ("join",),
    "faccel.training.local_sgd": ("SyncInfo", "averaged", "local_sgd"),
    "faccel.training.memory": ("empty_cache", "free_memory"),
    "faccel.training.optimizer_in_backward": ("step_in_backward",),
}  # fmt: skip
__getattr__, __dir__, __all__ = lazy(  # pyright: ignore[reportUnsupportedDunderAll]
    __name__, _NAMES
)
