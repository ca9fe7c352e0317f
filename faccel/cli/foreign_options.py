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
# Options of Accelerate 1.15 and torchrun in dashes; the longest prefix that matches applies.
EQUALS: Mapping[str, str] = {
    "--num-processes": "`--nproc N`, the processes per node",
    "--nproc-per-node": "`--nproc N`",
    "--multi-gpu": "`--nproc auto`",
    "--gpu-ids": "the variable `CUDA_VISIBLE_DEVICES`",
    "--use-cpu": "`--cpu`",
    "--num-machines": "`--nnodes N`",
    "--machine-rank": "`--node-rank R`",
    "--main-process-ip": "`--main-address HOST`",
    "--master-addr": "`--main-address HOST`",
    "--main-process-port": "`--main-port P`",
    "--master-port": "`--main-port P`",
    "--standalone": "`faccel launch` without it: one node is the default",
    "--rdzv-backend": "`--rdzv-endpoint HOST:PORT`",
    "--config-file": _IMPORT,
    "--gradient-accumulation-steps": "`--grad-accum N`",
    "--use-fsdp": _FSDP,
    "--fsdp-": _FSDP,
    "--use-deepspeed": _DEEPSPEED,
    "--deepspeed-": _DEEPSPEED,
    "--zero-stage": _DEEPSPEED,
    "--zero3-": _DEEPSPEED,
    "--offload-": _DEEPSPEED,
    "--gradient-clipping": "`faccel.optimizer_step(..., clip_norm=1.0)` in the script",
    "--dynamo-": _COMPILE,
    "--use-parallelism-config": "`--mesh dp_shard=2,tp=2`",
    "--parallelism-config-": "`--mesh dp_shard=2,tp=2`",
    "--same-network": "`faccel launch` without it",
    "--tee-": "`--log-dir DIR --tee`",
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
        matches = [name for name in EQUALS if dashed.startswith(name)]
        if not matches:
            return None
        return EQUALS[max(matches, key=len)]
