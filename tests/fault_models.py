"""The models of the fault cells: a network with probes that fail, and a critic of its outputs."""

import torch
import torch.nn.functional as F
from torch import nn

import faccel
from faccel.parallel import DdpConfig, PipelineConfig
from faccel.parallel.moe import MoE
from faccel.plan import ONE_STAGE_SCHEDULES

WIDTH, LENGTH = 8, 4  # of a row; tokens of a row where it is a sequence


class Probe(nn.Module):
    """Returns its input; at the chosen micro-batch it raises in forward, or in backward."""

    def __init__(self, points):
        super().__init__()
        self.points, self.fault, self.count = points, None, None

    def forward(self, x):
        if self.points["backward"] == "end" and not x.requires_grad:
            # On all ranks: the backward of a layer depends on whether its input has a gradient.
            x = x.detach().requires_grad_()
        if self.fault is None:
            return x
        micro = self.fault.micro_batch
        if self.count is not None:  # a stage of a pipeline
            micro = next(self.count)
        self.fault.fail_at(self.points["forward"], micro)
        return self.fault.attach(self.points["backward"], micro, x)


class Attend(nn.Module):
    """Attention of one head, whose queries, keys and values are the tokens themselves."""

    def forward(self, x):
        heads = x.unsqueeze(1)
        return F.scaled_dot_product_attention(heads, heads, heads).squeeze(1)


class Net(nn.Module):
    """Layers with dropout and a buffer; probes before the first and between the last two."""

    def __init__(self, norm=False, experts=False, attention=False):
        super().__init__()
        self.enter = Probe({"forward": "enter", "backward": "end"})
        self.first = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH) if norm else nn.Identity()
        self.inside = Probe({"forward": "inside", "backward": "middle"})
        self.attend = Attend() if attention else nn.Identity()
        self.drop = nn.Dropout(0.5)
        self.late = Probe({"forward": "inside", "backward": "middle"})
        self.moe = MoE(WIDTH, 8, 4) if experts else nn.Identity()
        self.second = nn.Linear(WIDTH, WIDTH)
        self.third = nn.Linear(WIDTH, 2)
        self.register_buffer("num_calls", torch.zeros(()))

    def forward(self, x):
        self.num_calls += 1
        x = self.attend(self.inside(self.norm(self.first(self.enter(x)).relu())))
        return self.third(self.late(self.second(self.moe(self.drop(x)))))


class Critic(nn.Module):
    """Separates rows of the data from outputs of `Net`, as in a GAN."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(2, WIDTH), nn.Linear(WIDTH, 1)

    def forward(self, x):
        return self.second(self.first(x).relu())


CHAIN = ("enter", "first", "norm", "inside", "attend", "drop", "moe", "second", "late", "third")


def plan_of(mesh, **options):
    if options.get("compile") == "units":
        options["units"] = "Linear"
    if "pp=" in mesh:
        pipeline = {"schedule": options.pop("schedule", "1f1b")}
        if pipeline["schedule"] not in ONE_STAGE_SCHEDULES:
            pipeline["stages_per_rank"] = 2
        return faccel.Plan(pipeline=PipelineConfig(chain=CHAIN, **pipeline), **options)
    if "tp=" in mesh:
        options["tensor"] = {"first": "colwise_gather", "second": "colwise", "third": "rowwise"}
    if options.pop("zero1", False):
        options["ddp"] = DdpConfig(shard_optimizer=True)
    return faccel.Plan(**{"units": "Linear"} | options)
