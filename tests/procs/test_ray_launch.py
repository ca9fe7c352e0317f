"""`faccel.launch(fn, on="ray")` on a local Ray cluster of two nodes: `pip install ray` (277 MB)."""

import json
import os
import signal
import subprocess
import sys

import pytest

import faccel
from tests.ranks import TIMEOUT_S

pytest.importorskip("ray", reason="`pip install ray`: it is not part of the extra `test`")
pytestmark = pytest.mark.slow

# Of the launches: the training of both disturbed runs and of the undisturbed one.
JOB = """
import json, os, signal, sys, threading
import faccel, torch
from torch.utils.data import DataLoader

def train(ctx, folder, disturbance):
    preempted = faccel.preemption(ctx)
    faccel.seed_everything(0, ctx)
    layers = [torch.nn.Linear(4, 8), torch.nn.Dropout(0.1), torch.nn.Linear(8, 1)]
    model = faccel.wrap(torch.nn.Sequential(*layers), ctx)
    opt = faccel.wrap_optimizer(torch.optim.Adam(model.parameters()), model, ctx)
    data = torch.randn(64, 4, generator=faccel.random.generator(1))
    loader = faccel.shard(DataLoader(data, 4, shuffle=True), ctx, split_batches=True)
    state = {"model": model, "opt": opt, "step": 0, "cursor": faccel.Cursor()}
    state |= {"scaler": faccel.init_scaler(ctx), "rng": faccel.rng_state(ctx)}
    if faccel.latest(folder, ctx):
        state = faccel.load(state, folder, ctx)
    faccel.set_rng_state(state["rng"])
    scaler, first = state["scaler"], state["step"]
    attempt = ctx.topology.attempt
    step = first
    for _, epoch in loader.epochs(1, start=state["cursor"]):
        for batch in faccel.batches(epoch):
            scaler = faccel.scaled_backward(model(batch.data).square().mean(), scaler, ctx)
            _, scaler = faccel.optimizer_step(opt, scaler, ctx)
            step += 1
            state |= {"scaler": scaler, "cursor": batch.cursor, "rng": faccel.rng_state(ctx)}
            if step % 2 == 1:  # the steps since the last checkpoint run twice
                faccel.save(state | {"step": step}, folder, ctx, step=step, keep=2)
            if attempt == 0 and step == 8 and ctx.rank == 1:
                if disturbance == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                if disturbance == "preempt":
                    os.kill(os.getpid(), signal.SIGTERM)
            if faccel.agree(ctx, stop=preempted.requested).stop:
                faccel.save(state | {"step": step}, folder, ctx, step=step)
                sys.exit(preempted.exit_code)
    weights = [p.detach().double().flatten().tolist() for p in model.parameters()]
    return {"weights": weights, "first": first, "last": step, "attempt": attempt}

def place(ctx):
    topology = ctx.topology
    local = [topology.local_rank, topology.local_world_size]
    return [topology.rank, topology.node_rank, topology.num_nodes, *local, ctx.config.seed]

def fail(ctx):
    if ctx.rank == 1:
        raise ValueError("bad sample")
    faccel.barrier(ctx)

def leave(ctx):
    if ctx.rank == 1:
        os._exit(7)
    faccel.barrier(ctx)

def on_gpu(ctx):
    return 0

def no_result(ctx):
    return (x for x in range(ctx.rank))

def wait(ctx, folder):
    with open(os.path.join(folder, f"pid{ctx.rank}"), "w") as file:
        file.write(str(os.getpid()))
    faccel.barrier(ctx)
    if ctx.rank == 0:
        open(os.path.join(folder, "waiting"), "w").close()
    while True:
        faccel.barrier(ctx)

def error_of(fn, *args, **options):
    try:
        faccel.launch(fn, *args, on="ray", **{"num_processes": 2, **options})
    except faccel.errors.FaccelError as error:
        return [type(error).__name__, str(error)]

if __name__ == "__main__":
    action, folder = sys.argv[1:]
    if action == "local":
        result = faccel.launch(train, f"{folder}/local", "", num_processes=2)
    if action == "interrupt":
        try:
            faccel.launch(wait, folder, on="ray", num_processes=2)
        except KeyboardInterrupt:
            result = "interrupted"
    if action == "ray":
        os.environ["FACCEL_SEED"] = "5"  # of this process only
        before = signal.getsignal(signal.SIGTERM)
        result = {"places": faccel.launch(place, on="ray", num_processes=2)}
        import ray
        result["is connected"] = ray.is_initialized()
        result["handler"] = signal.getsignal(signal.SIGTERM) == before
        # One connection for the rest, which each launch leaves open.
        ray.init()
        del os.environ["FACCEL_SEED"]
        ray_train = lambda ctx, *args: train(ctx, *args)  # a function that no process can import
        for name in ("kill", "preempt"):
            options = {"on": "ray", "num_processes": 2, "max_restarts": int(name == "kill")}
            result[name] = faccel.launch(ray_train, f"{folder}/{name}", name, **options)
        result["stays connected"] = ray.is_initialized()
        result["one rank"] = faccel.launch(place, on="ray", num_processes=1, config={"seed": 1})
        result["fail"] = error_of(fail)
        result["leave"] = error_of(leave)
        result["no result"] = error_of(no_result)
        result["lock"] = error_of(fail, threading.Lock())
        result["three"] = error_of(fail, num_processes=3, config={"start_timeout_s": 1})
        del os.environ["FACCEL_DEVICE"]
        result["on gpu"] = error_of(on_gpu, num_processes=None, resources={"CPU": 1, "GPU": 1})
    print("RESULT", json.dumps(result))
"""
# In another process, because a cluster changes the handlers of signals. It prints the address and
# waits for the end of its input.
CLUSTER = """
import sys
from ray.cluster_utils import Cluster

# Logical GPUs: Ray assigns them, and this node has none.
node = {"num_cpus": 1, "num_gpus": 1}
cluster = Cluster(initialize_head=True, head_node_args=node)
cluster.add_node(**node)
print("ADDRESS", cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""
PYTHON_PATH = os.pathsep.join([os.path.dirname(os.path.dirname(faccel.__file__)), *sys.path])


def line_after(word, file):
    """Return the rest of the first line that starts with a word."""
    for line in file:
        if line.startswith(word):
            return line.removeprefix(word).strip()
    raise AssertionError(f"no line starts with {word}")


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Yields a folder, and a function that starts the job with an action."""
    folder = tmp_path_factory.mktemp("job")
    script = folder / "job.py"
    script.write_text(JOB)
    # Ray writes its token into the home folder.
    env = {**os.environ, "PYTHONPATH": PYTHON_PATH, "HOME": str(folder)}
    cluster = subprocess.Popen(
        [sys.executable, "-c", CLUSTER],
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    env["FACCEL_DEVICE"] = "cpu"  # not in the environment of the cluster
    env["RAY_ADDRESS"] = line_after("ADDRESS", cluster.stdout)

    def start(action):
        return subprocess.Popen(
            [sys.executable, str(script), action, str(folder)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    yield folder, start
    cluster.communicate()


def result_of(process):
    out, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, errors
    return json.loads(line_after("RESULT", out.splitlines())), errors


@pytest.fixture(scope="module")
def on_ray(job):
    return result_of(job[1]("ray"))


@pytest.fixture(scope="module")
def undisturbed(job):
    return result_of(job[1]("local"))[0]


def test_each_rank_is_an_actor_with_the_configuration_of_the_script(on_ray):
    result, _ = on_ray
    assert result["places"] == [[0, 0, 2, 0, 1, 5], [1, 1, 2, 0, 1, 5]]
    assert result["one rank"] == [[0, 0, 1, 0, 1, 1]]
    assert result["handler"] and result["stays connected"] and not result["is connected"]


@pytest.mark.parametrize(("disturbance", "first"), [("kill", 7), ("preempt", 8)])
def test_a_disturbed_run_ends_with_the_parameters_of_an_undisturbed_one(
    on_ray, undisturbed, disturbance, first
):
    """A killed actor resumes from the last checkpoint; a preempted one saves before it ends."""
    result, errors = on_ray
    for rank in range(2):
        assert undisturbed[rank]["attempt"] == undisturbed[rank]["first"] == 0
        disturbed = result[disturbance][rank]
        assert disturbed == {**undisturbed[rank], "attempt": 1, "first": first}
    assert errors.count("restarting all ranks; restarts left: 0") == 1  # after the kill
    assert errors.count("preempted: a checkpoint is saved; starting all ranks again") == 1


ERRORS = {
    "fail": ("RankFailedError", "rank 1 of 2 failed", "ValueError: bad sample\non rank 1 of 2"),
    "leave": ("RankFailedError", "rank 1 of 2 failed", "the actor ended: "),
    "no result": ("RankFailedError", "the result of rank", "cannot pickle 'generator' object"),
    "lock": ("LaunchError", "the function or one of its arguments cannot be pickled", "To fix: "),
    "three": ("LaunchError", "not enough free resources for 3 ranks", "a cluster with {'CPU': 2"),
    "on gpu": ("RankFailedError", "of 2 failed", "no `cuda` device for process 0 of this node"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_fails_is_an_error_with_its_cause(on_ray, name):
    kind, *parts = ERRORS[name]
    error, message = on_ray[0][name]
    assert error == kind
    for part in parts:
        assert part in message


def test_an_interrupt_ends_the_actors(job):
    folder, start = job
    waiting = folder / "waiting"
    os.mkfifo(waiting)
    process = start("interrupt")
    waiting.read_bytes()  # until rank 0 has opened it
    process.send_signal(signal.SIGINT)
    assert result_of(process)[0] == "interrupted"
    for rank in range(2):
        with pytest.raises(ProcessLookupError):
            os.kill(int((folder / f"pid{rank}").read_text()), 0)
