"""How DDP compresses gradients before it reduces them: PyTorch's hooks, chosen by name."""

# No `from __future__ import annotations`: DDP compares a hook's annotations with the classes.

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from faccel.plan import DdpConfig

Hook = Callable[[Any, dist.GradBucket], torch.futures.Future[torch.Tensor]]


def _renamed(hook: Hook) -> Hook:
    """Return `hook` under another name.

    DDP refuses a hook named `bf16_compress_hook` without NCCL. On gloo it works.
    """

    def run(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        return hook(state, bucket)

    return run


# The casting hooks divide by the number of ranks before they sum: fp16 could overflow.
_HOOKS: dict[str, Hook] = {
    "fp16": default_hooks.fp16_compress_hook,
    "bf16": _renamed(default_hooks.bf16_compress_hook),
    "powersgd": powerSGD_hook.powerSGD_hook,
    "fp16_powersgd": default_hooks.fp16_compress_wrapper(powerSGD_hook.powerSGD_hook),
    "bf16_powersgd": _renamed(default_hooks.bf16_compress_wrapper(powerSGD_hook.powerSGD_hook)),
}


def register(engine: DistributedDataParallel, options: DdpConfig, group: dist.ProcessGroup) -> None:
    """Register the hook that `options.comm_hook` names. Updates `engine`."""
    name = str(options.comm_hook)
    # The state of the casting hooks is the group; without one they use all ranks.
    state: object = group
    if "powersgd" in name:
        # Vogels, Karimireddy and Jaggi 2019 (arXiv:1905.13727)
        powersgd = options.powersgd
        state = powerSGD_hook.PowerSGDState(
            group,
            matrix_approximation_rank=powersgd.rank,
            start_powerSGD_iter=powersgd.start_step,
            min_compression_rate=powersgd.min_compression_rate,  # pyright: ignore
            use_error_feedback=powersgd.use_error_feedback,
            warm_start=powersgd.warm_start,
            random_seed=powersgd.seed,
        )
    engine.register_comm_hook(state, _HOOKS[name])
