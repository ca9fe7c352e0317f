"""Inference on real ranks: dynamic work sharing, memory within a limit, unequal generation."""

import ctypes
import os
import resource
import threading

import pytest
import torch
from torch import nn

import faccel
from faccel.checkpoint import export_model
from faccel.inference import load_quantized, on_meta, place, share_work
from faccel.testing import fake_context
from tests.memory import DeepNet, status
from tests.ranks import run_ranks

NUM_ITEMS = 6
WIDTH, DEPTH = 1024, 40  # a layer has 4.2 MB, the model 168 MB
BUDGET = 32_000_000


def shared(ctx, fifo):
    """The rank with item 0 waits until the last item runs, which only the other rank can do."""

    def fn(batch):
        (item,) = batch
        if item == 0:
            with open(fifo) as file:
                file.read()
        if item == NUM_ITEMS - 1:
            with open(fifo, "w"):
                pass
        return [(item, ctx.rank)]

    return share_work(fn, range(NUM_ITEMS), ctx)


def test_a_rank_that_is_done_takes_the_items_of_one_that_is_busy(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    first, second = run_ranks(shared, 2, str(fifo))
    assert first == second
    assert [item for item, _ in first] == list(range(NUM_ITEMS))
    busy = first[0][1]
    assert [rank for _, rank in first] == [busy] + [1 - busy] * (NUM_ITEMS - 1)


def within_limit(ctx, folder):
    """Run the model in a process that cannot allocate more than 110 % of the budget."""
    x = torch.linspace(-1, 1, 2 * WIDTH).reshape(2, WIDTH)
    with on_meta():
        net = DeepNet(WIDTH, DEPTH)
    with torch.no_grad():
        nn.Linear(WIDTH, 2)(x)  # the first matrix product allocates memory of its library
    # The limit counts the 8 MB that a thread reserves for its stack, which the next thread reuses.
    thread = threading.Thread(target=bytes)
    thread.start()
    thread.join()
    ctypes.CDLL("libc.so.6").mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: frees at once
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets the peak
    before = status("VmRSS")
    limit = status("VmData") + int(1.1 * BUDGET)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))
    placed = place(net, folder, ctx, budget={"cpu": BUDGET, "disk": "1GB"})
    outputs = [placed(x) for _ in range(3)]
    resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY,) * 2)
    return outputs, status("VmHWM") - before, set(placed.placement.device_map.values())


@pytest.mark.slow
def test_a_model_five_times_its_budget_stays_within_it(tmp_path):
    torch.manual_seed(0)
    net = DeepNet(WIDTH, DEPTH)
    export_model(net, tmp_path, fake_context(0, 1))
    ((outputs, peak, devices),) = run_ranks(within_limit, 1, str(tmp_path))
    assert devices == {"cpu", "disk"}
    x = torch.linspace(-1, 1, 2 * WIDTH).reshape(2, WIDTH)
    with torch.no_grad():
        expected = net(x)
    for output in outputs:
        assert torch.equal(output, expected)
    assert peak <= 1.1 * BUDGET


def quantized(ctx, folder):
    """Return how much memory loading in 8 bits took, and the sizes of the weights."""
    with on_meta():
        net = DeepNet(WIDTH, DEPTH)
        # The first import, and the first product, allocate memory of the libraries.
        small = DeepNet(32, 1)
    export_model(DeepNet(32, 1), f"{folder}/small", ctx)
    load_quantized(small, f"{folder}/small", ctx)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets the peak
    before = status("VmRSS")
    result = load_quantized(net, folder, ctx)
    return result.num_bytes, status("VmHWM") - before


@pytest.mark.slow
def test_a_quantized_model_is_never_in_memory_with_its_full_size(tmp_path):
    pytest.importorskip("torchao", reason="torchao is not installed")
    export_model(DeepNet(WIDTH, DEPTH), tmp_path, fake_context(0, 1))
    ((num_bytes, peak),) = run_ranks(quantized, 1, str(tmp_path))
    layer = 4 * WIDTH**2
    assert num_bytes < 1.02 * DEPTH * WIDTH**2 + 2 * 4 * WIDTH
    # Besides the layer itself, torchao has three tensors of its size while it rounds.
    assert num_bytes < peak < num_bytes + 6 * layer < DEPTH * layer / 2


def llama():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.5,
    )
    return transformers.LlamaForCausalLM(config).eval()


def answer(generate, prompt, eos):
    return generate(
        torch.tensor([prompt]), eos_token_id=eos, pad_token_id=0, max_new_tokens=9, do_sample=False
    )[0].tolist()


def generated(ctx, prompts, eos):
    model = faccel.wrap(llama(), ctx)
    model.eval()
    with torch.no_grad():
        return answer(lambda *args, **kwargs: model.call("generate", *args, **kwargs),
                      prompts[ctx.rank], eos)  # fmt: skip


@pytest.mark.slow
def test_ranks_whose_sequences_end_at_different_lengths_generate_under_fsdp2(tmp_path):
    net = llama()
    plain = [answer(net.generate, [first, 3], eos=None)[2:] for first in range(4, 30)]
    # A token that ends one answer early, and does not occur in another one.
    choices = [
        (i, j, plain[i][2])
        for i in range(len(plain))
        for j in range(len(plain))
        if plain[i][2] not in plain[i][:2] and plain[i][2] not in plain[j]
    ]
    i, j, eos = choices[0]
    prompts = [[4 + i, 3], [4 + j, 3]]
    expected = [answer(net.generate, prompt, eos) for prompt in prompts]
    assert [len(tokens) for tokens in expected] == [5, 11]
    assert run_ranks(generated, 2, prompts, eos, mesh="dp_shard=2") == expected
