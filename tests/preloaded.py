"""What the server of `tests.ranks` imports: its forks start with it.

Modules only: nothing may be computed here, and no thread may start.
"""

import contextlib
import gc
import importlib
import os

MODULES = (
    "faccel.backends.ddp",
    "faccel.backends.ddp_engine",
    "faccel.backends.fsdp",
    "faccel.backends.pipeline",
    "faccel.backends.pipeline_engine",
    "faccel.checkpoint.export",
    "faccel.checkpoint.load",
    "faccel.checkpoint.save",
    "faccel.cli.commands",
    "faccel.func.tensordicts",
    "faccel.func.train_step",
    "faccel.launching.agent",
    "faccel.runtime",
    "faccel.testing.selftest",
    "faccel.tracking.console",
    "faccel.training.forward_backward",
    "faccel.training.step",
    "pytest",
    "sklearn.datasets",
    "torch",
    "torch._dynamo",
    "torch.distributed.checkpoint.default_planner",
    "torch.distributed.pipelining",
    "torch.distributed.run",
    # in an environment that has it
    "megatron.core.models.gpt.gpt_model",
    "megatron.core.optimizer",
)
# DeepSpeed chooses a device when it is imported, and forks cannot use a GPU of their parent.
if not os.path.exists("/dev/nvidiactl"):
    MODULES += ("deepspeed",)
for name in MODULES:
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
# A collection in a fork would copy the pages of all these objects.
gc.freeze()
