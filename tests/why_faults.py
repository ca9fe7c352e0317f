"""Helper: a training job with one faulty rank, for the tests of `faccel why`."""

import gc
import itertools
import os
import signal
import threading
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader

import faccel
from tests.ranks import SERVER, env_of, hosted_store

SLOW_S = 0.15
MESHES = {"ddp": None, "fsdp2": "dp_shard=2"}
# The fault, the verdict's kind, the phase (empty: the rank has ended, or waits in its next
# collective, which is in forward or backward), and a part of the sentence.
FAULTS = {
    "slow forward": ("slow", "forward", "rank 1 is slow in forward"),
    "slow backward": ("slow", "backward", "rank 1 is slow in backward"),
    "slow loader": ("slow", "data", "rank 1 is slow in the DataLoader"),
    "slow checkpoint": ("slow", "checkpoint", "rank 1 is slow in the checkpoint"),
    "slow collector": ("slow", "garbage collection", "rank 1 is slow in the garbage collection"),
    "sleeps": ("hung", "script", "rank 1 waits in the script"),
    "dies": ("broken", "", "rank 1 died without an error"),
    "loops": ("hung", "forward", "rank 1 computes in forward"),
    "waits in a lock": ("hung", "optimizer", "rank 1 waits in the optimizer"),
    "skips a collective": ("hung", "", "did not call all_reduce"),
}


class Faulty:
    """The faults of one rank; each method is called in its phase of each step."""

    def __init__(self, fault, report):
        self.fault = fault
        self.report = report

    def slow(self, fault):
        if self.fault == fault:
            time.sleep(SLOW_S)

    def begin_slow(self):
        if self.fault.startswith("slow"):
            self.report()

    def end(self, fault):
        if self.fault != fault:
            return
        self.report()
        if fault == "sleeps":
            time.sleep(1000)
        if fault == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "loops":
            while True:
                pass
        lock = threading.Lock()
        lock.acquire()
        lock.acquire()


class Net(nn.Module):
    def __init__(self, faulty):
        super().__init__()
        self.first = nn.Linear(8, 64)
        self.last = nn.Linear(64, 1)
        self.faulty = faulty

    def forward(self, x):
        self.faulty.slow("slow forward")
        self.faulty.end("loops")
        hidden = self.first(x)
        hidden.register_hook(lambda grad: self.faulty.slow("slow backward"))
        return self.last(hidden)


class Rows:
    def __init__(self, faulty):
        self.faulty = faulty

    def __len__(self):
        return 1_000_000

    def __getitem__(self, index):
        if index % 4 == 0:  # once per batch
            self.faulty.slow("slow loader")
        return torch.ones(8)


class Slow:
    """Takes its time to be freed, and only the collector can free it."""

    def __init__(self, faulty):
        self.cycle = self
        self.faulty = faulty

    def __del__(self):
        self.faulty.slow("slow collector")


class State:
    """A part of a checkpoint that takes its time on one rank."""

    def __init__(self, faulty):
        self.faulty = faulty

    def state_dict(self):
        self.faulty.slow("slow checkpoint")
        return {"a": 1}

    def load_state_dict(self, state):
        pass


def train(ctx, folder, faulty, fault, on_skip):
    model = faccel.wrap(Net(faulty), ctx)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    opt = faccel.wrap_optimizer(opt, model, ctx)
    opt.register_step_pre_hook(lambda *args: faulty.end("waits in a lock"))
    scaler = faccel.init_scaler(ctx)
    loader = faccel.shard(DataLoader(Rows(faulty), batch_size=4), ctx)
    for step, batch in enumerate(loader):
        if step > 2:
            faulty.end("sleeps")
            faulty.end("dies")
        if fault == "slow collector":
            Slow(faulty)
            gc.collect()
        if fault == "slow checkpoint":
            faccel.save({"model": model, "state": State(faulty)}, folder, ctx, step=step)
        loss = model(batch).square().mean()
        scaler = faccel.scaled_backward(loss, scaler, ctx)
        _, scaler = faccel.optimizer_step(opt, scaler, ctx)
        on_skip(step)
        if step == 3:
            faulty.begin_slow()


def run(rank, world_size, port, run_dir, strategy, fault, pipe):
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    torch.set_num_threads(1)
    options = {"run_dir": run_dir, "mesh": MESHES[strategy], "device": "cpu"}
    ctx = faccel.init(env=env_of(rank, world_size, port), **options)
    reports = itertools.count()

    def report():
        if next(reports) == 0:
            pipe.send(rank)

    is_faulty = rank == 1
    group = dist.new_group([0, 1])

    def skip(step):
        if fault != "skips a collective":
            return
        if is_faulty and step > 2:
            report()
            return
        dist.all_reduce(torch.ones(3), group=group)

    faulty = Faulty(fault if is_faulty else "", report)
    train(ctx, os.path.join(run_dir, "checkpoints"), faulty, fault, skip)


class Job:
    """A running job; `wait_for_fault` returns when its faulty rank has begun to be so."""

    def __init__(self, run_dir, strategy, fault, world_size=2):
        self.store = hosted_store()
        self.processes = []
        self.receiver, sender = SERVER.Pipe(duplex=False)
        for rank in range(world_size):
            arguments = (rank, world_size, self.store.port, run_dir, strategy, fault, sender)
            self.processes.append(SERVER.Process(target=run, args=arguments))
            self.processes[-1].start()
        sender.close()

    def wait_for_fault(self):
        return self.receiver.recv()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for process in self.processes:
            process.kill()
            process.join()
        self.receiver.close()
