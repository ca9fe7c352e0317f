"""Training runs in which ranks fail at a chosen point, beside loops written by hand.

The reference is never `forward_backward` with a policy: it is `scaled_backward` over the halves of
each micro-batch. On a pipeline, which has no such loop, it is a run whose loader has batches of
half the size. Its dataset is ordered so that each rank gets the same rows in the same order.
"""

import contextlib
import functools
import itertools
import time

import attrs
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

import faccel
from faccel.errors import DataError, RankFailedError
from faccel.parallel import context_parallel, split_sequence
from tests.fault_models import LENGTH, WIDTH, Critic, Net, Probe, plan_of

ROWS, SIZE = 32, 4  # of a window, and its micro-batches
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


@attrs.define(eq=False)
class Fault:
    """Where a rank raises: the rank, the point, the window and the micro-batch; `num_times`."""

    rank: int
    point: str
    window: int
    micro: int
    error: Exception
    num_times: int = 1
    raised: list = attrs.field(factory=list)
    current_window: int = -1
    micro_batch: int = -1  # counted by the loss function

    def begin(self, window):
        self.current_window, self.micro_batch = window, -1

    def fail(self):
        """Raise, if the fault is not used up."""
        if len(self.raised) == self.num_times:
            return
        self.micro_batch = -1  # a second attempt starts again
        self.raised.append((self.window, time.monotonic()))
        raise self.error

    def is_at(self, point, micro):
        position = (self.point, self.window, self.micro)
        return len(self.raised) < self.num_times and position == (point, self.current_window, micro)

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
    attention: bool = False
    adversary: bool = False
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
    def shape(self):
        """The shape of a row: a sequence where the model has attention."""
        if self.attention:
            return LENGTH, WIDTH
        return (WIDTH,)

    @contextlib.contextmanager
    def environment(self):
        """Run graphs of a compiled cell as they are: Inductor would compile for seconds."""
        if self.compile is None:
            yield
            return
        stance = torch.compiler.set_stance("default", force_backend="eager")
        # The limit for all models of a process.
        with stance, torch._dynamo.config.patch(recompile_limit=1000):
            yield

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
        return torch.randn(num, *self.shape, generator=generator, dtype=torch.float64).to(
            self.dtype
        )

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


def loss_of(cell, fault, error_of_rows=None, ctx=None):
    """Return the loss function of a cell, with the points at which it fails.

    Args:
        error_of_rows: Returns an error for each row; None is `regression_error`.
        ctx: Where rows are sequences that ranks have parts of.
    """
    error_of = error_of_rows or functools.partial(regression_error, ctx=ctx)

    def loss_fn(net, batch):
        if fault is not None:
            # Modulo: the rank of both the first and the last stage of a V calls it twice for
            # each micro-batch: for all inputs, then for all losses.
            fault.micro_batch = (fault.micro_batch + 1) % cell.size
            fault.fail_at("before", fault.micro_batch)
        loss = error_of(net, batch.data)
        if fault is not None:
            fault.fail_at("after", fault.micro_batch)
        loss = loss.sum() if cell.weight else loss.mean()
        if fault is not None:
            loss = fault.attach("start", fault.micro_batch, loss)
        if cell.has_aux:
            return loss, {"loss": loss}
        return loss

    return loss_fn


def regression_error(net, rows, ctx=None):
    """Return the error for each row; of the tokens of this rank, if rows are sequences."""
    if rows.ndim == 3:
        rows = split_sequence(rows, ctx, dim=1)
    return F.mse_loss(net(rows), rows[..., :2], reduction="none").flatten(1).mean(1)


@attrs.frozen(eq=False)
class Player:
    """A model that some windows train: one of two models takes every second window."""

    model: object
    opt: torch.optim.Optimizer
    error_of: object = None


def players_of(ctx, cell, fault):
    """Return the models of a cell in the order of their windows."""
    player = Player(*setup(ctx, cell, fault))
    if not cell.adversary:
        return [player]
    generator = player.model
    critic = faccel.wrap(Critic().to(cell.dtype), ctx, plan=cell.plan())
    opt = faccel.wrap_optimizer(torch.optim.AdamW(critic.parameters(), lr=0.05), critic, ctx)

    def critic_error(model, rows):
        with torch.no_grad():
            generated = generator(rows)
        return (model(generated).square() + (model(rows[:, :2]) - 1).square()).mean(1)

    def generator_error(model, rows):
        return (critic(model(rows)) - 1).square().mean(1)

    return [Player(critic, opt, critic_error), attrs.evolve(player, error_of=generator_error)]


def setup(ctx, cell, fault):
    torch.manual_seed(0)
    net = Net(cell.norm, cell.experts, cell.attention).to(cell.dtype)
    probes = [module for module in net.modules() if isinstance(module, Probe)]
    for probe in probes:
        probe.fault = fault
        if cell.compile:
            probe.forward = torch.compiler.disable(probe.forward)
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
    data = data.view(-1, cell.data_size, num_parts, cell.rows // num_parts, *cell.shape)
    data = data.transpose(1, 2).reshape(-1, *cell.shape)
    dataset = data
    if fault is not None:
        micro = fault.window * cell.size + fault.micro
        dataset = Rows(data, fault, (micro * cell.data_size + ctx.data_rank) * cell.rows)
    loader = faccel.shard(DataLoader(dataset, cell.rows // num_parts), ctx)
    weight = weight_of if cell.weight else None
    return faccel.windows(loader, ctx, size=cell.size * num_parts, weight=weight)


def values_of(players):
    values = {}
    for number, player in enumerate(players):
        model = player.model
        values |= {f"{number} {name}": local(p) for name, p in model.named_parameters()}
        values |= {f"{number} buffer {n}": local(b) for n, b in model.module.named_buffers()}
    return values


def gradients(players):
    grads = {}
    for number, player in enumerate(players):
        for name, param in player.model.named_parameters():
            if param.grad is not None:
                grads[f"{number} {name}"] = local(param.grad)
    return grads


def take_turn(players, number):
    """Return the player of a window, without gradients of the other one's loss."""
    for player in players[1:]:
        player.opt.zero_grad()
        players[0].opt.zero_grad()
    return players[number % len(players)]


@attrs.frozen(eq=False)
class Entry:
    """What a rank has after a window."""

    losses: torch.Tensor
    grads: dict
    values: dict
    max_rows: int | None = None
    is_skipped: bool = False
    ended_s: float = 0.0


@attrs.define(eq=False)
class Record:
    """What a rank has seen: an entry per window, and the error that ended the run."""

    entries: list = attrs.field(factory=list)
    error: Exception | None = None
    cause: str = ""  # the class of its cause
    raised: list = attrs.field(factory=list)  # the window and the time, for each failure
    ended_s: float = 0.0

    @property
    def num_raised(self):
        return len(self.raised)

    def actions(self):
        return [(entry.max_rows, entry.is_skipped) for entry in self.entries]


def run(ctx, cell, faults, policy=POLICY):
    """Train with `forward_backward`; return what this rank has seen."""
    fault = next((fault for fault in faults if fault.rank == ctx.rank), None)
    record = Record()
    players = players_of(ctx, cell, fault)
    scaler = faccel.init_scaler(ctx)
    try:
        for number, window in enumerate(windows_of(ctx, cell, fault)):
            torch.manual_seed(100 + number)
            player = take_turn(players, number)
            count_micro_batches(player.model, fault, cell, number)
            loss_fn = loss_of(cell, fault, player.error_of, ctx)
            with attention_of(ctx, cell):
                losses, scaler = faccel.forward_backward(
                    loss_fn, player.model, window, scaler, ctx, has_aux=cell.has_aux, **policy
                )
            ended_s = time.monotonic()
            if cell.has_aux:
                losses, auxs = losses
                assert [local(aux["loss"]).item() for aux in auxs] == losses.tolist()
            grads = gradients(players)
            info, scaler = faccel.optimizer_step(player.opt, scaler, ctx)
            entry = Entry(
                losses, grads, values_of(players), scaler.max_rows, bool(info.skipped), ended_s
            )
            record.entries.append(entry)
    except Exception as error:
        record.error, record.cause = error, type(error.__cause__).__name__
    record.ended_s = time.monotonic()
    if fault is not None:
        record.raised = fault.raised
    return record


def attention_of(ctx, cell):
    """Return the context in which attention is over the full sequence."""
    if cell.attention:
        return context_parallel(ctx)
    return contextlib.nullcontext()


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
    players = players_of(ctx, cell, None)
    scaler = faccel.init_scaler(ctx)
    num_loader_parts = [1 if not cell.is_pipeline else max(1, num) for num in parts]
    loaders = {num: windows_of(ctx, cell, num_parts=num) for num in sorted({*num_loader_parts})}
    for number, windows in enumerate(zip(*loaders.values(), strict=True)):
        if number >= len(parts) or parts[number] == 0:
            continue
        window = windows[list(loaders).index(num_loader_parts[number])]
        torch.manual_seed(100 + number)
        player = take_turn(players, number)
        if cell.is_pipeline:
            fn = loss_of(attrs.evolve(cell, has_aux=False), None)
            losses, scaler = faccel.forward_backward(fn, player.model, window, scaler, ctx)
        else:
            with attention_of(ctx, cell):
                losses, scaler = forward_by_hand(cell, player, window, scaler, ctx, parts[number])
        grads = gradients(players)
        _, scaler = faccel.optimizer_step(player.opt, scaler, ctx)
        entries.append(Entry(losses, grads, values_of(players)))
    return entries


def forward_by_hand(cell, player, window, scaler, ctx, num_parts):
    losses = []
    loss_fn = loss_of(attrs.evolve(cell, has_aux=False), None, player.error_of, ctx)
    for micro in window:
        parts = micro.data.chunk(num_parts)
        for index, part in enumerate(parts):
            scale = micro.scale
            if not cell.weight:
                scale = scale * len(part) / len(micro.data)
            with faccel.grad_sync(player.model, on=micro.sync and index == num_parts - 1):
                batch = attrs.evolve(micro, data=part, num_valid=len(part))
                loss = loss_fn(player.model, batch)
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


def agreement_s(records):
    """Return the longest time from a failure to the end of its window on a rank.

    The ranks have agreed before it: a second attempt of the window is included.
    """
    longest_s = 0.0
    for record in records:
        for window, raised_s in record.raised:
            for other in records:
                ended_s = other.ended_s
                if window < len(other.entries):
                    ended_s = other.entries[window].ended_s
                longest_s = max(longest_s, ended_s - raised_s)
    return longest_s


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
