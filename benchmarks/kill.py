"""A process killed at every write, fsync, rename, ... of a save: what loads afterwards.

faccel and Accelerate save a checkpoint, then a second one with a limit of one checkpoint (`keep=1`,
`total_limit=1`). strace kills them at the n-th system call of a kind, for every n. Then the newest
checkpoint is loaded: the result is the old state, the new one, a mixture, or an error.

python benchmarks/kill.py    (needs strace and the right to trace)
"""

import collections
import multiprocessing
import os
import shutil
import subprocess
import tempfile
import warnings

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from measure import report, target

import faccel

CALLS = ("write", "fsync", "rename", "mkdir", "unlink", "unlinkat", "rmdir")
MAX_CALLS = 200  # of one kind

FORK = multiprocessing.get_context("fork")
warnings.filterwarnings("ignore")


def filled(value):
    net = torch.nn.Linear(64, 64)
    with torch.no_grad():
        for p in net.parameters():
            p.fill_(value)
    opt = torch.optim.SGD(net.parameters(), lr=float(value), momentum=0.9)
    net(torch.ones(1, 64)).sum().backward()
    opt.step()
    with torch.no_grad():
        for p in net.parameters():
            p.fill_(value)
    return net, opt


def values(net, opt):
    """Return the values of all parameters and options: each save has a different one."""
    return {*net.weight.unique().tolist(), *net.bias.unique().tolist(), opt.param_groups[0]["lr"]}


def faccel_save(folder, value):
    with faccel.init(env={}) as ctx:
        net, opt = filled(value)
        return lambda: faccel.save({"net": net, "opt": opt}, folder, ctx, step=value, keep=1)


def faccel_load(folder):
    with faccel.init(env={}) as ctx:
        net, opt = filled(9)
        faccel.load({"net": net, "opt": opt}, folder, ctx)
        return values(net, opt)


def accelerate_of(folder, value):
    project = ProjectConfiguration(
        project_dir=folder, automatic_checkpoint_naming=True, total_limit=1, iteration=value - 1
    )
    accelerator = Accelerator(cpu=True, project_config=project)
    return accelerator, accelerator.prepare(*filled(value))


def accelerate_save(folder, value):
    accelerator, _ = accelerate_of(folder, value)
    return accelerator.save_state


def accelerate_load(folder):
    accelerator, (net, opt) = accelerate_of(folder, 9)
    accelerator.load_state()
    return values(net, opt)


CONTENDERS = {
    "faccel": (faccel_save, faccel_load),
    "accelerate": (accelerate_save, accelerate_load),
}


def writer(pipe, folder, prepare):
    prepare(folder, 1)()
    save = prepare(folder, 2)
    pipe.send("ready")
    pipe.recv()
    save()
    pipe.send("done")
    os._exit(0)


def reader(pipe, folder, load):
    try:
        loaded = load(folder)
        outcome = "mixture"
        if len(loaded) == 1:
            outcome = {1.0: "old", 2.0: "new"}[loaded.pop()]
        pipe.send(outcome)
    except BaseException as error:
        pipe.send(f"error: {type(error).__name__}")
    os._exit(0)


def start(fn, *args):
    pipe, child_pipe = FORK.Pipe()
    process = FORK.Process(target=fn, args=(child_pipe, *args))
    process.start()
    child_pipe.close()
    return process, pipe


def attempt(folder, prepare, load, call, number):
    """Return whether the writer was killed, and what loads afterwards."""
    process, pipe = start(writer, folder, prepare)
    assert pipe.recv() == "ready"
    kill = f"inject={call}:signal=SIGKILL:when={number}"
    attach = ["strace", "-f", "-p", str(process.pid), "-o", "/dev/null"]
    command = [*attach, "-e", f"trace={call}", "-e", kill]
    tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    line = tracer.stderr.readline()
    assert "attached" in line, line
    pipe.send("go")
    try:
        killed = pipe.recv() != "done"
    except EOFError:
        killed = True
    process.join()
    tracer.communicate()
    process, pipe = start(reader, folder, load)
    outcome = pipe.recv()
    process.join()
    return killed, outcome


def main():
    results = {}
    for name, (prepare, load) in CONTENDERS.items():
        counts = collections.Counter()
        for call in CALLS:
            for number in range(1, MAX_CALLS):
                folder = tempfile.mkdtemp()
                killed, outcome = attempt(folder, prepare, load, call, number)
                shutil.rmtree(folder)
                if not killed:
                    break
                counts[outcome] += 1
        results[name] = {"kills": sum(counts.values()), **counts}
        print(name, results[name], flush=True)

    def lost(name):
        counts = results[name]
        return counts["kills"] - counts.get("old", 0) - counts.get("new", 0)

    limit = target(
        "faccel: kills after which neither the old nor the new state loads",
        lost("faccel"),
        at_most=0,
    )
    report(
        "kill",
        {"calls": CALLS},
        results | {"lost": {name: lost(name) for name in CONTENDERS}},
        [limit],
    )


if __name__ == "__main__":
    main()
