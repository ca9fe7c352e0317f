"""`faccel.launch` and `faccel.notebook_launch`: from a script, a fork, and a notebook's kernel."""

import os
import signal
import subprocess
import sys

import nbclient
import nbformat
import pytest
import torch

import faccel
from faccel.errors import ConfigError, LaunchError, RankFailedError
from tests.ranks import SERVER, TIMEOUT_S

SCRIPT = """
import faccel, torch

def train(ctx, x):
    return ctx.rank, faccel.reduce(torch.tensor(x), ctx).item(), ctx.config.seed

if __name__ == "__main__":
    print(faccel.launch(train, 3, config="{config}#faccel", num_processes=2))
"""


def run_script(path, env):
    return subprocess.run(
        [sys.executable, str(path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT_S,
        env=env,
    )


@pytest.mark.slow
def test_a_function_runs_in_every_process_and_its_results_are_in_rank_order(tmp_path):
    config = tmp_path / "training.yaml"
    config.write_text("faccel: {seed: 5}\n")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace("{config}", str(config)))
    out = run_script(script, os.environ | {"TMPDIR": str(tmp_path)})
    assert out.stdout == "[(0, 6, 5), (1, 6, 5)]\n", out.stderr
    names = {path.name for path in tmp_path.iterdir()}
    names = {name for name in names if not name.startswith("pytorch-errorfile")}  # PyTorch's
    assert names == {"script.py", "training.yaml"}


@pytest.mark.parametrize(
    ("fn", "options", "error", "message"),
    [
        (lambda ctx: 1, {}, LaunchError, "at the top level of a module"),
        (5, {}, LaunchError, "`fn` must be a function. Got 5"),
        (print, {"config": "none.yaml"}, ConfigError, "none.yaml"),
        (print, {"config": {"sed": 1}}, ConfigError, "use `seed`"),
        (print, {"num_processes": 0}, ConfigError, "`num_processes` must be a positive int"),
    ],
)
def test_an_invalid_launch_raises_before_a_process_starts(fn, options, error, message):
    with pytest.raises(error) as caught:
        faccel.launch(fn, **{"num_processes": 2, **options})
    assert message in str(caught.value)


def test_a_launch_in_a_launched_process_is_an_error(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(LaunchError, match="a process that a launcher started"):
        faccel.launch(print, num_processes=2)


TOP_LEVELS = {
    "a call": ("faccel.launch(len, num_processes=2)\n", "line 2"),
    "in a function": (
        "def main():\n    faccel.launch(len, num_processes=2)\nwith open(__file__):\n    main()\n",
        "line 5",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TOP_LEVELS)
def test_a_launch_at_the_top_level_of_a_script_raises_before_a_process_starts(name, tmp_path):
    text, line = TOP_LEVELS[name]
    script = tmp_path / "script.py"
    script.write_text(f"import faccel\n{text}")
    out = run_script(script, os.environ)
    assert out.returncode == 1
    assert out.stderr.count("Traceback") == 1
    assert f"{script}, {line}" in out.stderr
    assert 'put the call below `if __name__ == "__main__":`' in out.stderr


@pytest.mark.slow
def test_an_if_that_is_no_guard_prints_the_error_of_the_launched_process(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import faccel\nif True:\n    faccel.launch(len, num_processes=2)\n")
    out = run_script(script, os.environ)
    assert out.returncode == 1
    assert 'put the call below `if __name__ == "__main__":`' in out.stderr


def fail(ctx, how):
    if how == "exit":
        sys.exit(3)
    if how == "result":
        return lambda: 1
    if ctx.rank == 1:
        raise ValueError("bad sample")
    if how == "raise in torch":  # an error of gloo, not of faccel
        return torch.distributed.all_reduce(torch.ones(1))
    return faccel.reduce(torch.ones(1), ctx)


HOWS = ("exit", "result", "raise", "raise in torch")


def launch_failures(pipe):
    """Return the problem and the value of the error, for each way to fail."""
    messages = {}
    for how in HOWS:
        try:
            # The processes are forked, which is faster than `launch` and reports the same way.
            faccel.notebook_launch(fail, how, num_processes=2)
        except RankFailedError as error:
            messages[how] = (error.problem, error.got)
    pipe.send(messages)


@pytest.mark.slow
def test_a_failed_process_raises_an_error_with_its_traceback():
    receiver, sender = SERVER.Pipe(duplex=False)
    process = SERVER.Process(target=launch_failures, args=(sender,))
    process.start()
    sender.close()
    messages = receiver.recv()
    process.join()
    assert "sys.exit(3)" in messages["exit"][1]
    assert "<lambda>" in messages["result"][1]
    # The error of the rank that failed, not that of the rank that waited for it.
    for how in ("raise", "raise in torch"):
        problem, traceback = messages[how]
        assert problem == "rank 1 of 2 failed"
        assert traceback.splitlines()[-2:] == ["ValueError: bad sample", "on rank 1 of 2"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_function_of_a_notebook_cell_trains_on_two_processes():
    cells = [
        "import os\nos.environ['OMP_NUM_THREADS'] = '1'\nimport faccel, torch",
        # A fork after a parallel region hangs, unless the launcher prevents it.
        "torch.randn(200, 200) @ torch.randn(200, 200)",
        """
def train(ctx, rows):
    model = faccel.wrap(torch.nn.Linear(4, 1), ctx)
    opt = faccel.wrap_optimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, ctx)
    loss = model(torch.ones(rows, 4)).mean()
    scaler = faccel.scaled_backward(loss, faccel.init_scaler(ctx), ctx)
    faccel.optimizer_step(opt, scaler, ctx)
    return ctx.rank, ctx.world_size
""",
        "print(faccel.notebook_launch(train, 8, num_processes=2))",
        "print(faccel.notebook_launch(train, 8, num_processes=1))",
        """
for launch in (faccel.launch, faccel.notebook_launch):
    try:
        launch(train, "no number", num_processes=2)
    except faccel.errors.FaccelError as error:
        print(type(error).__name__, "|", error.got.splitlines()[-2:], "|", error.fix)
""",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in cells])
    nbclient.NotebookClient(notebook, timeout=TIMEOUT_S, kernel_name="python3").execute()
    assert notebook.cells[3].outputs[0].text == "[(0, 2), (1, 2)]\n"
    assert notebook.cells[4].outputs[0].text == "[(0, 1)]\n"
    outputs = [output for output in notebook.cells[5].outputs if output.name == "stdout"]
    spawned, forked = "".join(output.text for output in outputs).splitlines()
    assert spawned.startswith("LaunchError")
    assert spawned.endswith("write `faccel.notebook_launch(train, ...)`")
    assert forked.startswith("RankFailedError | ['TypeError: ")


def launch_and_wait(pipe):
    def work(ctx):
        pipe.send((ctx.rank, os.getpid()))
        while True:
            faccel.barrier(ctx)

    before = [signal.getsignal(number) for number in SIGNALS]
    try:
        faccel.notebook_launch(work, num_processes=2)
    except KeyboardInterrupt:
        pipe.send([signal.getsignal(number) for number in SIGNALS] == before)


def launch_under_nohup(pipe):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    ranks = faccel.notebook_launch(lambda ctx: signal.raise_signal(signal.SIGHUP), num_processes=2)
    pipe.send((ranks, signal.getsignal(signal.SIGHUP)))


def test_an_ignored_signal_stays_ignored():
    receiver, sender = SERVER.Pipe(duplex=False)
    process = SERVER.Process(target=launch_under_nohup, args=(sender,))
    process.start()
    sender.close()
    assert receiver.recv() == ([None, None], signal.SIG_IGN)
    process.join(TIMEOUT_S)
    assert process.exitcode == 0


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_ends_the_ranks_and_then_reaches_the_script(number):
    receiver, sender = SERVER.Pipe(duplex=False)
    process = SERVER.Process(target=launch_and_wait, args=(sender,))
    process.start()
    sender.close()
    pids = dict(receiver.recv() for _ in range(2))
    os.kill(process.pid, number)
    if number == signal.SIGINT:
        assert receiver.recv()  # KeyboardInterrupt, and the handlers of before
    with pytest.raises(EOFError):
        receiver.recv()  # no process has the pipe
    process.join(TIMEOUT_S)
    expected = -number
    if number == signal.SIGINT:
        expected = 0
    assert process.exitcode == expected
    for pid in pids.values():
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
