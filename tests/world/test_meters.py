"""Meters: rates by arithmetic on a synthetic clock, operations by the closed form of a model."""

import copy
import time

import attrs
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset

import faccel
from faccel.errors import ConfigError
from faccel.testing import fake_context, simulate
from faccel.tracking import PeakMemory, flops_of, init_meter, rates, tick
from faccel.tracking.flops import peak_of_model
from faccel.tracking.rank_counts import RankCounts, combined
from tests.ranks import run_ranks


class Clock:
    """A clock that moves when a test moves it."""

    def __init__(self):
        self.now_s = 100.0

    def __call__(self):
        return self.now_s

    def advance(self, seconds):
        self.now_s += seconds


class SlowItems(Dataset):
    """Eight numbers; reading one takes some seconds on the clock."""

    def __init__(self, clock, seconds=1):
        self.clock, self.seconds = clock, seconds

    def __len__(self):
        return 8

    def __getitem__(self, index):
        self.clock.advance(self.seconds)
        return float(index)


# window, warmup, seconds of the steps -> steps per second of those that count
STEPS = {
    "the last steps": (2, 0, [9, 9, 3, 5], 2 / 8),
    "fewer than the window": (50, 0, [1, 3], 2 / 4),
    "after the warm-up": (50, 1, [1000, 1, 3], 2 / 4),
    "after a longer warm-up": (3, 2, [1000, 1000, 4, 4, 8, 4], 3 / 16),
    "one step": (1, 0, [1, 2], 1 / 2),
}


@pytest.mark.parametrize("name", STEPS)
def test_rates_are_those_of_the_last_steps_after_the_warm_up(name):
    window, warmup, seconds, expected = STEPS[name]
    clock, ctx = Clock(), fake_context(0, 1)
    meter = init_meter(ctx, window=window, warmup=warmup, clock=clock)
    for duration in seconds:
        clock.advance(duration)
        meter = tick(meter, samples=3, tokens=7)
    result = rates(meter, ctx)
    assert (result.steps_s, result.samples_s) == (expected, 3 * expected)
    assert result.tokens_s == 7 * expected
    totals = (result.num_steps, result.num_samples, result.num_tokens)
    assert totals == (len(seconds), 3 * len(seconds), 7 * len(seconds))


@pytest.mark.parametrize("num_ticks", [0, 1, 2])
def test_rates_are_unknown_before_the_first_step_after_the_warm_up(num_ticks):
    clock, ctx = Clock(), fake_context(0, 1)
    meter = init_meter(ctx, flops_per_sample=1, peak_flops=1, warmup=2, clock=clock)
    for _ in range(num_ticks):
        clock.advance(1)
        meter = tick(meter, samples=1)
    result = rates(meter, ctx)
    unknown = ("samples_s", "tokens_s", "steps_s", "mfu", "data_wait", "comm_wait", "slowest_rank")
    assert [getattr(result, name) for name in unknown] == [None] * len(unknown)
    assert set(result.known()) == {"peak_bytes", "num_steps", "num_samples", "num_tokens"}


def test_a_tick_changes_no_record_and_needs_constant_memory():
    clock = Clock()
    first = init_meter(fake_context(0, 1), window=4, clock=clock)
    meter = first
    sizes = set()
    for step in range(1, 1000):
        clock.advance(1)
        meter = tick(meter, samples=1)
        if step > 10:
            sizes.add(num_tuples_in(meter))
    assert max(sizes) <= 2 * 4 + 1  # two windows of steps, and the meter
    assert (first.num_steps, meter.num_steps) == (0, 999)
    with pytest.raises(AttributeError):
        meter.num_steps = 3


def num_tuples_in(value):
    """Return how many tuples a tuple holds, itself included."""
    return 1 + sum(num_tuples_in(item) for item in value if isinstance(item, tuple))


class NoOperators(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} ran")


def test_a_tick_runs_no_operator_of_torch_and_no_collective():
    def fn(ctx):
        meter = init_meter(ctx)
        with NoOperators():
            for _ in range(60):
                meter = tick(meter, samples=4, tokens=9)

    assert simulate(fn, 2).trace == ()


# mesh -> how many ranks have samples that no other rank has
MESHES = {
    "dp_replicate=4": 4,
    "dp_shard=4": 4,
    "tp=4": 1,
    "dp_replicate=2,tp=2": 2,
    "dp_shard=2,pp=2": 2,
}


@pytest.mark.parametrize("mesh", MESHES)
def test_samples_are_summed_over_data_ranks_by_one_collective(mesh):
    def fn(ctx):
        clock = Clock()
        meter = init_meter(ctx, warmup=0, clock=clock, flops_per_sample=6, peak_flops=100)
        for _ in range(5):
            clock.advance(2)
            meter = tick(meter, samples=10 + ctx.data_rank, tokens=2**60 + ctx.data_rank)
        return rates(meter, ctx)

    results = simulate(fn, 4, mesh=mesh)
    per_step = sum(10 + rank for rank in range(MESHES[mesh]))
    assert len(set(results)) == 1
    assert results[0].samples_s == per_step / 2
    assert results[0].num_samples == 5 * per_step
    # 4 devices of 100 FLOP/s for 2 s per step
    assert results[0].mfu == pytest.approx(6 * per_step / (4 * 100 * 2), rel=1e-12)
    assert len(results.trace) == 4
    assert {event.op for event in results.trace} == {"all_gather"}


def test_totals_are_exact_beyond_the_integers_of_a_float():
    def fn(ctx):
        meter = tick(init_meter(ctx), samples=2**53 + 1, tokens=2**60 + ctx.rank)
        result = rates(meter, ctx)
        return result.num_samples, result.num_tokens

    assert simulate(fn, 3)[0] == (3 * (2**53 + 1), 3 * 2**60 + 3)


def test_ranks_of_different_lengths_have_one_result():
    def fn(ctx):
        clock = Clock()
        meter = init_meter(ctx, warmup=0, clock=clock)
        for _ in range(2 + ctx.rank):
            clock.advance(1)
            meter = tick(meter, samples=1)
        return rates(meter, ctx)

    results = simulate(fn, 2)
    assert results[0] == attrs.evolve(results[1])
    assert (results[0].steps_s, results[0].samples_s, results[0].num_samples) == (1.0, 5 / 3, 5)


READERS = {
    "for": lambda loader, ctx: loader.at(0),
    "batches": lambda loader, ctx: faccel.batches(loader.at(0)),
    "windows": lambda loader, ctx: faccel.windows(loader.at(0), ctx, size=1),
    "uneven": lambda loader, ctx: faccel.batches(loader.at(0)),
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("world_size", [1, 2])
def test_the_wait_for_data_is_the_time_in_next_of_a_loader(name, world_size):
    def fn(ctx):
        clock = Clock()
        tail = "uneven" if name == "uneven" else "pad"
        loader = faccel.shard(DataLoader(SlowItems(clock), batch_size=2), ctx, tail=tail)
        meter = init_meter(ctx, warmup=0, clock=clock)
        for _ in READERS[name](loader, ctx):
            clock.advance(6)  # after 2 s for 2 items
            meter = tick(meter)
        return rates(meter, ctx)

    result = simulate(fn, world_size)[0]
    # `windows` reads one window ahead: its first `next` reads two, and its last one nothing.
    assert result.data_wait == pytest.approx(2 / 8, rel=1e-9)
    assert result.num_steps == 4 // world_size


def test_the_wait_for_data_is_unknown_without_a_loader_of_faccel():
    def fn(ctx):
        clock = Clock()
        meter = init_meter(ctx, warmup=0, clock=clock)
        for _ in DataLoader(SlowItems(clock), batch_size=2):
            meter = tick(meter)
        return rates(meter, ctx).data_wait

    assert simulate(fn, 1) == (None,)


def test_a_loop_that_ends_early_closes_the_loader():
    closed = []

    class Source(torch.utils.data.IterableDataset):
        def __iter__(self):
            try:
                yield from [torch.ones(1)] * 8
            finally:
                closed.append(True)

    ctx = fake_context(0, 1)
    init_meter(ctx)
    iterator = iter(faccel.shard(DataLoader(Source(), 1), ctx).at(0))
    next(iterator)
    iterator.close()
    assert closed == [True]


def slow_before_reduce(ctx, clock, slow_rank):
    """Each step takes 4 s on one rank, and no time on the others, which wait for it."""
    meter = init_meter(ctx, warmup=0, clock=clock)
    for _ in range(3):
        if ctx.rank == slow_rank:
            clock.advance(4)
        faccel.reduce(torch.ones(()), ctx)
        meter = tick(meter, samples=1)
    return rates(meter, ctx)


@pytest.mark.parametrize("slow_rank", range(3))
def test_the_rank_that_the_others_wait_for_is_the_slowest(slow_rank):
    clock = Clock()  # of all ranks, which take turns
    results = simulate(slow_before_reduce, 3, clock, slow_rank)
    assert [result.slowest_rank for result in results] == [slow_rank] * 3
    assert results[0].comm_wait > 0.6


def test_the_rank_that_waits_for_data_is_the_slowest():
    def fn(ctx):
        clock = Clock()
        seconds = 3 if ctx.rank == 1 else 1
        loader = faccel.shard(DataLoader(SlowItems(clock, seconds), batch_size=2), ctx)
        meter = init_meter(ctx, warmup=0, clock=clock)
        for _ in loader.at(0):
            clock.advance(10 - 2 * seconds)  # each step takes 10 s on both ranks
            meter = tick(meter)
        result = rates(meter, ctx)
        return result.slowest_rank, result.data_wait

    assert simulate(fn, 2) == ((1, 0.6), (1, 0.6))


@pytest.mark.parametrize("world_size", [1, 3])
def test_no_rank_is_the_slowest_if_all_are_equally_fast(world_size):
    def fn(ctx):
        clock = Clock()
        meter = init_meter(ctx, warmup=0, clock=clock)
        for _ in range(3):
            clock.advance(1)
            faccel.barrier(ctx)
            meter = tick(meter)
        result = rates(meter, ctx)
        return result.slowest_rank, result.comm_wait

    assert set(simulate(fn, world_size)) == {(None, 0.0)}


WRONG = {
    "a tensor": (lambda m: tick(m, tokens=torch.ones(())), "reading a tensor waits"),
    "a negative count": (lambda m: tick(m, samples=-1), "`samples` must be an int of at least 0"),
    "a float": (lambda m: tick(m, samples=1.5), "`samples` must be an int of at least 0"),
    "a bool": (lambda m: tick(m, tokens=True), "`tokens` must be an int of at least 0"),
    "an integer of NumPy": (lambda m: tick(m, samples=np.int64(3)), r"write `samples=int\(n\)`"),
    "no meter": (lambda m: tick(3, samples=1), r"meter = init_meter\(ctx\)"),
    "rates without ctx": (lambda m: rates(m, m), r"rates\(meter, ctx\)"),
    "swapped": (lambda m: rates(fake_context(0, 1), m), r"rates\(meter, ctx\)"),
    "init without ctx": (lambda m: init_meter(3), r"init_meter\(ctx\)"),
    "a model to count": (lambda m: flops_of(torch.ones(2)), r"`fn` must be a function"),
}
WRONG_OPTIONS = {
    "`window`": {"window": 0},
    "`warmup`": {"warmup": -1},
    "`peak_flops`": {"peak_flops": 0},
    "`flops_per_sample`": {"flops_per_sample": -1.0},
    "`flops_per_sample` must be at least 1 and below": {"flops_per_sample": 2.0**63},
    "`peak_flops` must be at least 1 and below": {"peak_flops": float("inf")},
    "`peak_flops` must be at least 1": {"peak_flops": 0.25},
    "`clock": {"clock": lambda: "noon"},
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_of_a_meter_is_an_error(name):
    call, message = WRONG[name]
    with pytest.raises(ConfigError, match=message):
        call(init_meter(fake_context(0, 1)))


@pytest.mark.parametrize("message", WRONG_OPTIONS)
def test_a_wrong_option_of_a_meter_is_an_error(message):
    with pytest.raises(ConfigError, match=message):
        init_meter(fake_context(0, 1), **WRONG_OPTIONS[message])


def test_the_largest_operations_of_a_sample_are_those_of_two_ranks():
    flops = 2.0**63 - 1024  # the float before 2**63

    def fn(ctx):
        clock = Clock()
        meter = init_meter(ctx, warmup=0, flops_per_sample=flops, peak_flops=flops, clock=clock)
        clock.advance(4)
        return rates(tick(meter, samples=1), ctx).mfu

    assert simulate(fn, 2) == (0.25, 0.25)


@pytest.mark.parametrize("num_steps", [1, 5])
def test_rates_are_unknown_if_the_clock_was_set_back(num_steps):
    ctx, clock = fake_context(0, 1), Clock()
    meter = init_meter(ctx, warmup=0, clock=clock)
    for _ in range(num_steps):
        clock.advance(-1)
        meter = tick(meter, samples=2)
    result = rates(meter, ctx)
    assert (result.samples_s, result.steps_s, result.slowest_rank) == (None, None, None)
    assert (result.num_steps, result.num_samples) == (num_steps, 2 * num_steps)


def test_meters_of_long_windows_are_compared_hashed_and_copied_as_objects():
    clock = Clock()
    meter = other = init_meter(fake_context(0, 1), window=10**6, clock=clock)
    for _ in range(10_000):  # deeper than Python's limit of recursion
        meter, other = tick(meter), tick(other)
    assert meter == meter
    assert meter != other
    assert len({meter, other, meter}) == 2
    assert copy.copy(meter).num_steps == 10_000
    # The waits of a copy would stand still.
    assert copy.deepcopy({"meter": meter})["meter"] is meter


def test_meters_of_one_context_have_one_clock():
    ctx, clock = fake_context(0, 1), Clock()
    init_meter(ctx, clock=clock)
    init_meter(ctx, clock=clock)
    with pytest.raises(ConfigError, match="that of the first meter"):
        init_meter(ctx, clock=Clock())


# Name that PyTorch reports, precision, and the dense peak on the vendor's data sheet in TFLOP/s.
PEAKS = [
    ("Tesla V100-SXM2-16GB", "fp16", 125),
    ("Tesla V100-PCIE-16GB", "fp16", 112),
    ("Tesla V100-SXM2-16GB", "bf16", None),  # has no bf16
    ("Tesla T4", "fp16", 65),
    ("NVIDIA A100-SXM4-80GB", "bf16", 312),
    ("NVIDIA A100 80GB PCIe", "tf32", 156),
    ("NVIDIA A100-SXM4-80GB", "fp32", 19.5),
    ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", "bf16", None),
    ("NVIDIA A10", "bf16", 125),
    ("NVIDIA A10G", "bf16", None),
    ("NVIDIA L4", "bf16", 121),
    ("NVIDIA L40", "bf16", None),
    ("NVIDIA L40S", "bf16", 362),
    ("NVIDIA H100 80GB HBM3", "bf16", 989),  # not 1979, which is for sparse matrices
    ("NVIDIA H100 PCIe", "bf16", 756),
    ("NVIDIA H100 NVL", "bf16", 835),
    ("NVIDIA H200", "bf16", 989),
    ("NVIDIA GH200 480GB", "fp16", 989),
    ("NVIDIA B200", "bf16", 2250),
    ("NVIDIA GB200", "bf16", 2500),
    ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
    ("NVIDIA GeForce RTX 4090 D", "bf16", None),
    ("AMD Instinct MI300X", "bf16", 1307.4),
    ("TPU v4", "bf16", 275),
    ("TPU v5 lite", "bf16", 197),
    ("TPU v5e", "bf16", 197),
    ("TPU v5p", "bf16", 459),
    ("TPU v6e", "bf16", 918),
    ("a device of the future", "bf16", None),
    ("", "bf16", None),
]


@pytest.mark.parametrize(("name", "precision", "tera"), PEAKS)
def test_the_peak_of_a_device_is_the_published_dense_one(name, precision, tera):
    expected = None if tera is None else pytest.approx(tera * 1e12)
    assert peak_of_model(name, precision) == expected


def test_an_unknown_device_has_no_utilization_until_its_peak_is_passed():
    for options, expected in (({}, None), ({"peak_flops": 50}, 3 * 10 / (2 * 50))):
        clock, ctx = Clock(), fake_context(0, 1)
        meter = init_meter(ctx, flops_per_sample=10, warmup=0, clock=clock, **options)
        clock.advance(2)
        assert rates(tick(meter, samples=3), ctx).mfu == expected


DIM, HEADS, LENGTH, VOCABULARY, LAYERS = 32, 4, 24, 50, 2


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.up, self.down = nn.Linear(DIM, 4 * DIM), nn.Linear(4 * DIM, DIM)
        self.norms = nn.ModuleList([nn.LayerNorm(DIM), nn.LayerNorm(DIM)])

    def forward(self, x):
        heads = self.qkv(self.norms[0](x)).unflatten(-1, (3, HEADS, DIM // HEADS))
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class Gpt(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, DIM)
        self.blocks = nn.Sequential(*[Block() for _ in range(LAYERS)])
        self.head = nn.Linear(DIM, VOCABULARY)

    def forward(self, tokens):
        return self.head(self.blocks(self.embedding(tokens)))


# Multiplications and additions of one sequence in forward: 12 d^2 per token and layer, two products
# of attention, and the head.
GPT_FLOPS = 2 * LENGTH * (LAYERS * (12 * DIM**2 + 2 * LENGTH * DIM) + DIM * VOCABULARY)
MODES = {
    "the kernel of the CPU": {},
    "products": {"backends": nn.attention.SDPBackend.MATH},
    "meta": {"device": "meta"},
    "compiled": {"compile": True},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_operations_of_a_gpt_equal_the_closed_form(mode, batch_size):
    options = MODES[mode]
    device = options.get("device", "cpu")
    model = Gpt().to(device)
    if options.get("compile"):
        model.compile(backend="aot_eager")
    tokens = torch.zeros(batch_size, LENGTH, dtype=torch.int64, device=device)
    backends = options.get("backends", list(nn.attention.SDPBackend.__members__.values()))
    with nn.attention.sdpa_kernel(backends):
        forward = flops_of(model, tokens)
        both = flops_of(lambda: model(tokens).sum().backward())
    assert forward == pytest.approx(batch_size * GPT_FLOPS, rel=1e-3)
    assert both == pytest.approx(3 * batch_size * GPT_FLOPS, rel=1e-3)


def test_operations_of_convolutions_and_keyword_arguments():
    conv = nn.Conv2d(3, 8, 5, bias=False)
    # each output element is a product of 3*5*5 elements
    assert flops_of(conv, torch.ones(2, 3, 9, 9)) == 2 * (2 * 8 * 5 * 5) * (3 * 5 * 5)
    assert flops_of(F.linear, torch.ones(4, 6), weight=torch.ones(2, 6)) == 2 * 4 * 6 * 2
    assert flops_of(lambda: torch.ones(3) + 1) == 0


def test_memory_on_the_cpu_is_the_resident_size_of_the_process():
    ctx = fake_context(0, 1)
    tensor = torch.ones(2**24)  # 64 MiB
    assert rates(init_meter(ctx), ctx).peak_bytes > tensor.nbytes


def rates_with_memory(ctx):
    model = faccel.wrap(nn.Linear(8, 8, bias=False), ctx)
    layers = [nn.Linear(1, ctx.rank + 1, bias=False)]  # differs between ranks
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(2, 8)).sum().backward()
    opt.step()
    return rates(init_meter(ctx, state={"model": model, "more": layers, "opt": opt}), ctx)


def test_rates_have_the_memory_of_the_rank_with_most_of_it():
    results = simulate(rates_with_memory, 3)
    assert results[0] == results[1] == results[2]
    memory = results[0].memory
    assert (memory.parameters, memory.gradients) == (4 * (64 + 3), 4 * (64 + 3))
    assert (memory.optimizer, memory.activations, memory.peak) == (4 * 64, None, None)
    known = results[0].known()
    assert (known["memory_parameters"], "memory_peak" in known) == (4 * 67, False)
    assert "memory" not in known


def test_the_memory_is_of_the_rank_with_the_highest_peak():
    # peak_bytes, then parameters, gradients, optimizer states and activations
    ranks = [(900, 10, 10, 10, 870), (1000, 1, 1, 1, 997), (5000, -1, -1, -1, -1)]
    rows = [RankCounts(*[0] * 6, peak, *[0] * 5, *sizes) for peak, *sizes in ranks]
    memory = combined(rows, [0]).memory
    assert memory == PeakMemory(1, 1, 1, 997, 1000)


def test_a_meter_does_not_keep_a_model_alive():
    ctx = fake_context(0, 1)
    model = faccel.wrap(nn.Linear(2, 2), ctx)
    meter = init_meter(ctx, state=[model])
    assert rates(meter, ctx).memory.parameters == 24
    del model
    faccel.parallel.free_memory(ctx)
    assert rates(meter, ctx).memory is None


def test_a_state_without_a_model_is_an_error_where_the_meter_begins():
    with pytest.raises(ConfigError, match="neither a model nor an optimizer"):
        init_meter(fake_context(0, 1), state={"step": 3})


class SlowOnOneRank(Dataset):
    def __init__(self, is_slow):
        self.is_slow = is_slow

    def __len__(self):
        return 40

    def __getitem__(self, index):
        if self.is_slow:
            time.sleep(0.01)
        return torch.ones(2)


def measure_processes(ctx, cause):
    model = faccel.wrap(nn.Linear(2, 1), ctx)
    opt = faccel.wrap_optimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, ctx)
    scaler = faccel.init_scaler(ctx)
    is_slow = ctx.rank == 1
    dataset = SlowOnOneRank(is_slow and cause == "data")
    meter = init_meter(ctx)
    for batch in faccel.batches(faccel.shard(DataLoader(dataset, 4), ctx).at(0)):
        if is_slow and cause == "forward":
            time.sleep(0.04)
        loss = model(batch.data).mean()
        faccel.agree(ctx, stop=False)
        scaler = faccel.scaled_backward(loss, scaler, ctx)
        _, scaler = faccel.optimizer_step(opt, scaler, ctx)
        meter = tick(meter, samples=batch.num_valid)
    return rates(meter, ctx)


@pytest.mark.slow
@pytest.mark.parametrize("cause", ["data", "forward"])
def test_processes_name_the_slow_rank_and_what_the_others_wait_for(cause):
    results = run_ranks(measure_processes, 2, cause)
    assert [result.slowest_rank for result in results] == [1, 1]
    assert results[0].num_samples == 40
    assert results[0].comm_wait > 0.1
    assert (results[0].data_wait > 0.1) == (cause == "data")
