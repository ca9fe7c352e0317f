"""Training runs in which ranks fail at a chosen point, beside loops written by hand.

The reference is never `forward_backward` with a policy: it is `scaled_backward` over the halves of
each micro-batch. On a pipeline, which has no such loop, it is a run whose loader has batches of
half the size. Its dataset is ordered so that each rank gets the same rows in the same order.
"""

import itertools
import time

import attrs
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

import faccel
from faccel.errors import DataError, RankFailedError
from faccel.parallel import DdpConfig, PipelineConfig
from faccel.parallel.moe import MoE

ROWS, WIDTH, SIZE = 32, 8, 4  # of a window, of a row, and micro-batches
NUM_WINDOWS = 3


def local(tensor):
    """Return a copy of what this rank has: a comparison must not communicate."""
    with torch.no_grad():
        return getattr(tensor, "_local_tensor", tensor).detach().clone()


class NamedError(Exception):
    """An exception that a policy of a test names."""


KINDS = {
    "oom": torch.OutOfMemoryError, "named": NamedError, "data": DataError, "other": KeyError,
}  # fmt: skip
POLICY = {"retry": faccel.Retry(on=(NamedError,)), "skip": (DataError,)}


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


class Net(nn.Module):
    """Layers with dropout and a buffer; probes before the first and between the last two."""

    def __init__(self, norm=False, experts=False):
        super().__init__()
        self.enter = Probe({"forward": "enter", "backward": "end"})
        self.first = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH) if norm else nn.Identity()
        self.inside = Probe({"forward": "inside", "backward": "middle"})
        self.drop = nn.Dropout(0.5)
        self.late = Probe({"forward": "inside", "backward": "middle"})
        self.moe = MoE(WIDTH, 8, 4) if experts else nn.Identity()
        self.second = nn.Linear(WIDTH, WIDTH)
        self.third = nn.Linear(WIDTH, 2)
        self.register_buffer("num_calls", torch.zeros(()))

    def forward(self, x):
        self.num_calls += 1
        x = self.inside(self.norm(self.first(self.enter(x)).relu()))
        return self.third(self.late(self.second(self.moe(self.drop(x)))))


CHAIN = ("enter", "first", "norm", "inside", "drop", "moe", "second", "late", "third")


def plan_of(mesh, **options):
    if "pp=" in mesh:
        pipeline = {"schedule": options.pop("schedule", "1f1b")}
        if pipeline["schedule"] == "interleaved":
            pipeline["stages_per_rank"] = 2
        return faccel.Plan(pipeline=PipelineConfig(chain=CHAIN, **pipeline), **options)
    if "tp=" in mesh:
        options["tensor"] = {"first": "colwise_gather", "second": "colwise", "third": "rowwise"}
    if options.pop("zero1", False):
        options["ddp"] = DdpConfig(shard_optimizer=True)
    return faccel.Plan(units="Linear", **options)


@attrs.define(eq=False)
class Fault:
    """Where a rank raises: the rank, the point, the window and the micro-batch; `num_times`."""

    rank: int
    point: str
    window: int
    micro: int
    error: Exception
    num_times: int = 1
    num_raised: int = 0
    raised_s: float = 0.0
    current_window: int = -1
    micro_batch: int = -1  # counted by the loss function

    def begin(self, window):
        self.current_window, self.micro_batch = window, -1

    def fail(self):
        """Raise, if the fault is not used up."""
        if self.num_raised == self.num_times:
            return
        self.num_raised += 1
        self.micro_batch = -1  # a second attempt starts again
        self.raised_s = time.monotonic()
        raise self.error

    def is_at(self, point, micro):
        position = (self.point, self.window, self.micro)
        return self.num_raised < self.num_times and position == (point, self.current_window, micro)

    def fail_at(self, point, micro):
        if self.is_at(point, micro):
            self.fail()

    def attach(self, point, micro, x):
        """Return `x`, with a hook that raises in backward if the fault is at this point."""
        if not self.is_at(point, micro):
            return x
        if x.requires_grad:
            x.register_hook(lambda grad: self.fail())
        return x


class Rows:
    """A dataset that raises at an index while its fault is at that point."""

    def __init__(self, data, fault, index):
        self.data, self.fault, self.index = data, fault, index

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        if self.fault.point == "loader" and index == self.index:
            self.fault.fail()
        return self.data[index]


@attrs.frozen
class Cell:
    """A layout and its options."""

    mesh: str
    schedule: str = "1f1b"
    zero1: bool = False
    norm: bool = False
    experts: bool = False
    compile: str | None = None
    checkpoint: bool = False
    weight: bool = False
    has_aux: bool = False
    size: int = SIZE
    short: bool = False
    dtype: torch.dtype = torch.float64
    precision: str = "no"

    @property
    def is_pipeline(self):
        return "pp=" in self.mesh

    @property
    def world_size(self):
        return faccel.MeshSpec.of(self.mesh).size

    @property
    def data_size(self):
        return faccel.MeshSpec.of(self.mesh).data_world_size

    @property
    def rows(self):
        return ROWS // SIZE // self.data_size  # of a micro-batch

    def config(self):
        return faccel.Config(mixed_precision=self.precision)

    def data(self):
        num = self.rows * self.data_size * (self.size * NUM_WINDOWS + (self.size // 2) * self.short)
        generator = torch.Generator().manual_seed(5)
        return torch.randn(num, WIDTH, generator=generator, dtype=torch.float64).to(self.dtype)

    def plan(self):
        options = {"zero1": self.zero1}
        if self.is_pipeline:
            options = {"schedule": self.schedule}
        if self.compile:
            options["compile"] = self.compile
        if self.checkpoint:
            options["activation_checkpoint"] = 1
        return plan_of(self.mesh, **options)


def weight_of(batch):
    return batch.num_valid


def loss_of(cell, fault):
    def loss_fn(net, batch):
        if fault is not None:
            fault.micro_batch += 1
            fault.fail_at("before", fault.micro_batch)
        rows = batch.data
        loss = F.mse_loss(net(rows), rows[:, :2], reduction="none").mean(1)
        if fault is not None:
            fault.fail_at("after", fault.micro_batch)
        loss = loss.sum() if cell.weight else loss.mean()
        if fault is not None:
            loss = fault.attach("start", fault.micro_batch, loss)
        if cell.has_aux:
            return loss, {"loss": loss}
        return loss

    return loss_fn


def setup(ctx, cell, fault):
    torch.manual_seed(0)
    net = Net(cell.norm, cell.experts).to(cell.dtype)
    probes = [module for module in net.modules() if isinstance(module, Probe)]
    for probe in probes:
        probe.fault = fault
    model = faccel.wrap(net, ctx, plan=cell.plan())
    opt = faccel.wrap_optimizer(torch.optim.AdamW(model.parameters(), lr=0.05), model, ctx)
    if fault is not None and fault.point == "optimizer":
        opt.register_step_pre_hook(lambda *args: fail_in_optimizer(fault))
    if fault is not None and fault.point == "param":
        param = next(p for p in model.parameters() if p.requires_grad)
        param.register_hook(lambda grad: fault.fail_at("param", fault.micro_batch))
    return model, opt


def fail_in_optimizer(fault):
    if fault.current_window == fault.window:
        fault.fail()


def windows_of(ctx, cell, fault=None, *, num_parts=1):
    """Return the windows of a cell; their micro-batches are cut into parts by another loader."""
    data = cell.data()
    # [micro, data rank, part, row] to [micro, part, data rank, row]: each rank has the same rows
    data = data.view(-1, cell.data_size, num_parts, cell.rows // num_parts, WIDTH).transpose(1, 2)
    data = data.reshape(-1, WIDTH)
    dataset = data
    if fault is not None:
        micro = fault.window * cell.size + fault.micro
        dataset = Rows(data, fault, (micro * cell.data_size + ctx.data_rank) * cell.rows)
    loader = faccel.shard(DataLoader(dataset, cell.rows // num_parts), ctx)
    weight = weight_of if cell.weight else None
    return faccel.windows(loader, ctx, size=cell.size * num_parts, weight=weight)


def values_of(model):
    params = {name: local(p) for name, p in model.named_parameters()}
    buffers = {f"buffer {name}": local(b) for name, b in model.module.named_buffers()}
    return params | buffers


def gradients(model):
    return {name: local(p.grad) for name, p in model.named_parameters() if p.grad is not None}


@attrs.frozen(eq=False)
class Entry:
    """What a rank has after a window."""

    losses: torch.Tensor
    grads: dict
    values: dict
    max_rows: int | None = None
    is_skipped: bool = False


@attrs.define(eq=False)
class Record:
    """What a rank has seen: an entry per window, and the error that ended the run."""

    entries: list = attrs.field(factory=list)
    error: Exception | None = None
    cause: str = ""  # the class of its cause
    num_raised: int = 0
    raised_s: float = 0.0  # when the fault of this rank raised
    ended_s: float = 0.0

    def actions(self):
        return [(entry.max_rows, entry.is_skipped) for entry in self.entries]


def run(ctx, cell, faults, policy=POLICY):
    """Train with `forward_backward`; return what this rank has seen."""
    fault = next((fault for fault in faults if fault.rank == ctx.rank), None)
    record = Record()
    model, opt = setup(ctx, cell, fault)
    scaler = faccel.init_scaler(ctx)
    loss_fn = loss_of(cell, fault)
    try:
        for number, window in enumerate(windows_of(ctx, cell, fault)):
            torch.manual_seed(100 + number)
            count_micro_batches(model, fault, cell, number)
            losses, scaler = faccel.forward_backward(
                loss_fn, model, window, scaler, ctx, has_aux=cell.has_aux, **policy
            )
            if cell.has_aux:
                losses, auxs = losses
                assert [local(aux["loss"]).item() for aux in auxs] == losses.tolist()
            grads = gradients(model)
            info, scaler = faccel.optimizer_step(opt, scaler, ctx)
            entry = Entry(losses, grads, values_of(model), scaler.max_rows, bool(info.skipped))
            record.entries.append(entry)
    except Exception as error:
        record.error, record.cause = error, type(error.__cause__).__name__
    record.ended_s = time.monotonic()
    if fault is not None:
        record.num_raised, record.raised_s = fault.num_raised, fault.raised_s
    return record


def count_micro_batches(model, fault, cell, number):
    """Let the probes of a pipeline count from 0; else the loss function counts."""
    if fault is None:
        return
    fault.begin(number)
    for module in model.module.modules():
        if isinstance(module, Probe) and cell.is_pipeline:
            module.count = itertools.count()


def run_reference(ctx, cell, parts):
    """Train with a loop written by hand; `parts` of a micro-batch for each window, 0 to skip."""
    entries = []
    model, opt = setup(ctx, cell, None)
    scaler = faccel.init_scaler(ctx)
    num_loader_parts = [1 if not cell.is_pipeline else max(1, num) for num in parts]
    loaders = {num: windows_of(ctx, cell, num_parts=num) for num in sorted({*num_loader_parts})}
    for number, windows in enumerate(zip(*loaders.values(), strict=True)):
        if number >= len(parts) or parts[number] == 0:
            continue
        window = windows[list(loaders).index(num_loader_parts[number])]
        torch.manual_seed(100 + number)
        if cell.is_pipeline:
            fn = loss_of(attrs.evolve(cell, has_aux=False), None)
            losses, scaler = faccel.forward_backward(fn, model, window, scaler, ctx)
        else:
            losses, scaler = forward_by_hand(cell, model, window, scaler, ctx, parts[number])
        grads = gradients(model)
        _, scaler = faccel.optimizer_step(opt, scaler, ctx)
        entries.append(Entry(losses, grads, values_of(model)))
    return entries


def forward_by_hand(cell, model, window, scaler, ctx, num_parts):
    losses = []
    loss_fn = loss_of(attrs.evolve(cell, has_aux=False), None)
    for micro in window:
        parts = micro.data.chunk(num_parts)
        for index, part in enumerate(parts):
            scale = micro.scale
            if not cell.weight:
                scale = scale * len(part) / len(micro.data)
            with faccel.grad_sync(model, on=micro.sync and index == num_parts - 1):
                batch = attrs.evolve(micro, data=part, num_valid=len(part))
                loss = loss_fn(model, batch)
                scaler = faccel.scaled_backward(loss, scaler, ctx, scale=scale)
            losses.append(local(loss))
    return torch.stack(losses), scaler


def difference(entry, expected):
    """Return what differs in a bit, or None."""
    if not torch.equal(entry.losses, expected.losses):
        return f"losses {entry.losses}, not {expected.losses}"
    for kind in ("grads", "values"):
        mine, reference = getattr(entry, kind), getattr(expected, kind)
        if mine.keys() != reference.keys():
            return f"{kind} of {mine.keys()}, not {reference.keys()}"
        for name, value in mine.items():
            if not torch.equal(value, reference[name]):
                return f"{kind} {name}: {value}, not {reference[name]}"
    return None


def parts_of(cell, record):
    """Return the number of parts of a micro-batch in each window, as the record has them."""
    parts = []
    for max_rows, is_skipped in record.actions():
        parts.append(0 if is_skipped else cell.rows // (max_rows or cell.rows))
    return parts


def is_after_last_meeting(cell, records, faults):
    """Return whether a rank fails where the others need nothing from it, until their run ends."""
    last = NUM_WINDOWS + cell.short - 1
    return any(
        fault.window == last and fault.point in ("optimizer", "end")
        for fault in faults
        if records[fault.rank].error is not None and records[fault.rank].num_raised
    )


def disagreement(cell, records, faults):
    """Return what is wrong with the ends of the runs of all ranks, or None."""
    errors = [record.error for record in records]
    if not any(errors):
        if len({str(record.actions()) for record in records}) > 1:
            return f"different actions: {[record.actions() for record in records]}"
        num = NUM_WINDOWS + cell.short
        return None if len(records[0].entries) == num else "windows are missing"
    if not all(errors) and not is_after_last_meeting(cell, records, faults):
        return f"some ranks raised, others not: {errors}"
    # A rank that fails raises its exception; a pipeline of torch wraps it.
    raised = {fault.rank for fault in faults if records[fault.rank].num_raised}
    for rank, error in enumerate(errors):
        if error is None:
            continue
        names = {kind.__name__ for kind in KINDS.values()}
        is_own = type(error).__name__ in names or records[rank].cause in names
        if not isinstance(error, RankFailedError) and not (is_own and rank in raised):
            return f"rank {rank} raised {error!r}, from a {records[rank].cause}"
    return None


def failure_of(cell, records, faults, reference_of):
    """Return what is wrong with a run, or None.

    Args:
        reference_of: Returns the entries of all ranks for parts of micro-batches.
    """
    problem = disagreement(cell, records, faults)
    if problem is not None:
        return problem
    num_common = min(len(record.entries) for record in records)
    reference = reference_of(parts_of(cell, records[0])[:num_common])
    for rank, record in enumerate(records):
        entries = [entry for entry in record.entries[:num_common] if not entry.is_skipped]
        for number, (entry, expected) in enumerate(zip(entries, reference[rank], strict=True)):
            problem = difference(entry, expected)
            if problem is not None:
                return f"rank {rank}, update {number}: {problem}"
    return None
