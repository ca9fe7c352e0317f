"""Options of `accelerate launch` and `torchrun`: an error with the equal of faccel."""

from __future__ import annotations

from collections.abc import Mapping

import click

from faccel.cli.flags import UsageError
from faccel.errors import LaunchError

_IMPORT = "`faccel config import FILE -o faccel.yaml`, then `faccel launch --config faccel.yaml`"
_FSDP = "`--mesh dp_shard=-1`, and options such as `faccel.Plan(units=...)` in the script"
_DEEPSPEED = "`--strategy deepspeed --zero 2`, and options in `faccel.parallel.DeepSpeedConfig`"
_COMPILE = '`faccel.Plan(compile="whole")` in the script'
# Options of Accelerate 1.15 and torchrun as Accelerate writes them. The longest prefix applies.
EQUALS: Mapping[str, str] = {
    "num_processes": "`--nproc N`, the processes per node",
    "nproc_per_node": "`--nproc N`",
    "multi_gpu": "`--nproc auto`",
    "gpu_ids": "the variable `CUDA_VISIBLE_DEVICES`",
    "use_cpu": "`--cpu`",
    "num_machines": "`--nnodes N`",
    "machine_rank": "`--node-rank R`",
    "main_process_ip": "`--main-address HOST`",
    "master_addr": "`--main-address HOST`",
    "main_process_port": "`--main-port P`",
    "master_port": "`--main-port P`",
    "standalone": "`faccel launch` without it: one node is the default",
    "rdzv_backend": "`--rdzv-endpoint HOST:PORT`",
    "config_file": _IMPORT,
    "gradient_accumulation_steps": "`--grad-accum N`",
    "use_fsdp": _FSDP,
    "fsdp_": _FSDP,
    "use_deepspeed": _DEEPSPEED,
    "deepspeed_": _DEEPSPEED,
    "zero_stage": _DEEPSPEED,
    "zero3_": _DEEPSPEED,
    "offload_": _DEEPSPEED,
    "gradient_clipping": "`faccel.optimizer_step(..., clip_norm=1.0)` in the script",
    "dynamo_": _COMPILE,
    "use_parallelism_config": "`--mesh dp_shard=2,tp=2`",
    "parallelism_config_": "`--mesh dp_shard=2,tp=2`",
    "same_network": "`faccel launch` without it",
    "tee_": "`--log-dir DIR --tee`",
}


class LaunchCommand(click.Command):
    """A command that names the equal of an option of another launcher."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the words after the command.

        Raises:
            UsageError: One of them is an option of another launcher.
        """
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            equal = self._equal(ctx, error.option_name)
            if equal is None:
                raise
            raise UsageError(
                LaunchError(
                    f"`{error.option_name}` is not an option of `faccel launch`",
                    got=f"`{error.option_name}` before the script",
                    fix=f"use {equal}",
                )
            ) from None

    def _equal(self, ctx: click.Context, option: str) -> str | None:
        """Return what to use instead of an option; None if it is not one of another launcher."""
        dashed = option.replace("_", "-")
        for param in self.get_params(ctx):
            if dashed in param.opts:  # `--mixed_precision`
                return f"`{dashed}`"
        underscored = option.lstrip("-").replace("-", "_")
        matches = [name for name in EQUALS if underscored.startswith(name)]
        if not matches:
            return None
        return EQUALS[max(matches, key=len)]
