"""A model of 3 GB in a budget of 1 GB: equal logits, peak memory, the time of a forward pass.

Each contender runs in another process. The one of faccel cannot allocate more than 110 %
of the budget (RLIMIT_DATA, beyond what its imports have allocated). A pass is compared with reading
the files once, in the same process, into one buffer of 16 MB: from the disk ("cold"), and from the
cache of the operating system ("warm"). Accelerate's `load_checkpoint_and_dispatch` gets the same
placement; it first writes the offloaded weights to a folder.

    python benchmarks/offload.py
"""

import argparse
import ctypes
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from measure import report, target

PASSES = 5
TOKENS = 4
SIZES = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 14}
BUDGET = {"cpu": 10**9, "disk": 10**11}
MAX_PEAK, MAX_RATIO = 1.1, 1.2


def model(sizes):
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = sizes["hidden_size"] // 64
    config = LlamaConfig(
        vocab_size=8192, num_attention_heads=heads, num_key_value_heads=heads, **sizes
    )
    return LlamaForCausalLM(config).eval()


def write(folder, sizes):
    """Write random weights, with which logits have a usual size."""
    import faccel
    from faccel.testing import fake_context

    torch.manual_seed(0)
    faccel.checkpoint.export_model(model(sizes), folder, fake_context(0, 1), max_shard_size="5GB")


def status(field):
    """Return a size of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def drop_from_cache(folder, scratch):
    """Let the operating system forget the files, as those of a model that is larger than memory."""
    for path in [*Path(folder).iterdir(), *Path(scratch).iterdir()]:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_once(folder):
    """Read all bytes of the files into one buffer."""
    buffer = memoryview(bytearray(1 << 24))
    for path in sorted(Path(folder).glob("*.safetensors")):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def measure(run, folder, scratch, *, is_cold):
    """Return the seconds of passes and of reads, which alternate."""
    seconds = {"pass": [], "read": []}
    calls = {"read": lambda: read_once(folder), "pass": run}
    for _ in range(PASSES):
        for name, call in calls.items():
            if is_cold:
                drop_from_cache(folder, scratch)
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def with_faccel(folder, sizes, budget, scratch):
    from faccel.inference import on_meta, place
    from faccel.testing import fake_context

    with on_meta():
        net = model(sizes)
    placed = place(net, folder, fake_context(0, 1), budget=budget)
    return lambda ids: placed(ids).logits


def with_accelerate(folder, sizes, budget, scratch):
    from accelerate import init_empty_weights, load_checkpoint_and_dispatch

    from faccel.inference import placement_for

    with init_empty_weights():
        net = model(sizes)
    device_map = placement_for(net, budget).device_map
    device_map["model.rotary_emb"] = "cpu"
    placed = load_checkpoint_and_dispatch(
        net, folder, device_map=device_map, offload_folder=scratch
    )
    return lambda ids: placed(ids).logits


def unlimited(folder, sizes, budget, scratch):
    import faccel
    from faccel.testing import fake_context

    net = model(sizes)
    faccel.checkpoint.load_model(net, folder, fake_context(0, 1))
    return lambda ids: net(ids).logits


CONTENDERS = {"unlimited": unlimited, "faccel": with_faccel, "accelerate": with_accelerate}


def job(name, folder, out, scratch, sizes, budget):
    """Run one contender in this process, and write its figures and logits."""
    # Everything that is imported at the first use.
    model({**sizes, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1})(
        torch.zeros(1, 1, dtype=torch.long)
    )
    import accelerate  # noqa: F401
    import safetensors.torch  # noqa: F401

    import faccel.inference.place_model
    import faccel.testing  # noqa: F401

    # Blocks that are freed are unmapped at once. Otherwise those that a model on meta has never
    # touched would count in the limit.
    ctypes.CDLL("libc.so.6").mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD
    before = status("VmRSS")
    limit = budget["cpu"] * MAX_PEAK
    if name == "faccel":
        size = status("VmData") + int(limit)
        resource.setrlimit(resource.RLIMIT_DATA, (size, size))
    start = time.perf_counter()
    run = CONTENDERS[name](folder, sizes, budget, scratch)
    load_s = time.perf_counter() - start
    ids = torch.arange(TOKENS)[None]
    with torch.no_grad():
        logits = run(ids)  # the first pass learns the order of use
        cold = measure(lambda: run(ids), folder, scratch, is_cold=True)
        warm = measure(lambda: run(ids), folder, scratch, is_cold=False)
    figures = {
        "load_s": load_s,
        "peak_bytes": status("VmHWM") - before,
        "scratch_bytes": sum(p.stat().st_size for p in Path(scratch).iterdir()),
    }
    for state, seconds in (("cold", cold), ("warm", warm)):
        ratios = [a / b for a, b in zip(seconds["pass"], seconds["read"], strict=True)]
        figures[f"{state}_pass_s"] = statistics.median(seconds["pass"])
        figures[f"{state}_read_s"] = statistics.median(seconds["read"])
        figures[f"{state}_ratio"] = statistics.median(ratios)
    torch.save(logits, f"{out}/{name}.pt")
    Path(out, f"{name}.json").write_text(json.dumps(figures))


def compare(sizes, budget, names=tuple(CONTENDERS)):
    """Run the contenders on the same files; return their figures by name."""
    figures = {}
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root, "weights")
        folder.mkdir()
        write(folder, sizes)
        for name in names:
            scratch = Path(root, f"scratch-{name}")
            scratch.mkdir()
            args = [name, str(folder), root, str(scratch), json.dumps([sizes, budget])]
            env = os.environ | {"TQDM_DISABLE": "1"}
            subprocess.run([sys.executable, __file__, "--job", *args], env=env, check=True)
            figures[name] = json.loads(Path(root, f"{name}.json").read_text())
            logits = torch.load(Path(root, f"{name}.pt"))
            expected = torch.load(Path(root, f"{names[0]}.pt"))
            figures[name]["equal"] = torch.equal(logits, expected)
        num_bytes = sum(path.stat().st_size for path in folder.iterdir())
    return num_bytes, figures


def main():
    num_bytes, figures = compare(SIZES, BUDGET)
    print(f"{num_bytes / 1e9:.2f} GB of weights, a budget of {BUDGET['cpu'] / 1e9:.2f} GB")
    for name, row in figures.items():
        print(
            f"{name:11} load {row['load_s']:5.1f} s   peak {row['peak_bytes'] / 1e9:.2f} GB   "
            f"written {row['scratch_bytes'] / 1e9:.2f} GB   equal logits: {row['equal']}"
        )
        for state in ("cold", "warm"):
            print(
                f"    files {state} in the cache: pass {row[f'{state}_pass_s']:.2f} s = "
                f"{row[f'{state}_ratio']:.2f} x reading once"
            )
    row = figures["faccel"]
    report(
        "offload",
        {"sizes": SIZES, "budget": BUDGET, "passes": PASSES, "num_bytes": num_bytes},
        figures,
        [
            target("equal logits", row["equal"], at_least=1),
            target("peak / budget", row["peak_bytes"] / BUDGET["cpu"], at_most=MAX_PEAK),
            target("pass / reading once, from disk", row["cold_ratio"], at_most=MAX_RATIO),
            target("bytes written", row["scratch_bytes"], at_most=0),
        ],
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--job", nargs=5)
    args = parser.parse_args()
    if args.job is None:
        main()
        sys.exit()
    *strings, text = args.job
    job(*strings, *json.loads(text))
