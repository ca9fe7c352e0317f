"""Launching from inside: a script, and a notebook in a real kernel."""

import os
import subprocess
import sys

import nbclient
import nbformat
import pytest

import faccel
from faccel.errors import ConfigError, LaunchError

SCRIPT = """
import faccel, torch

def body(ctx, x):
    if x < 0 and ctx.rank == 1:
        raise ValueError("bad sample")
    return ctx.rank, faccel.reduce(torch.tensor(x), ctx).item(), ctx.config.seed

if __name__ == "__main__":
    print(faccel.launch(body, 3, config="{config}#faccel", num_processes=2))
    try:
        faccel.launch(body, -3, num_processes=2)
    except faccel.errors.RankFailedError as error:
        print(error.problem, "|", error.got.splitlines()[-2:])
"""


def run(script, env):
    command = [sys.executable, str(script)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=120, env=env
    )


def test_a_function_runs_on_every_process_and_its_results_come_back_by_rank(tmp_path):
    config = tmp_path / "training.yaml"
    config.write_text("faccel: {seed: 5}\n")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace("{config}", str(config)))
    out = run(script, os.environ)
    assert out.returncode == 0, out.stderr
    first, second = out.stdout.splitlines()
    assert first == "[(0, 6, 5), (1, 6, 5)]"
    assert second.startswith("rank 1 of 2 failed |")
    assert "ValueError: bad sample" in second


BAD = """
import sys, faccel

def body(ctx, how):
    if how == "exit":
        sys.exit(3)
    if how == "result":
        return lambda: 1

def tried(*args, **options):
    try:
        faccel.launch(*args, num_processes=2, **options)
    except (faccel.errors.FaccelError) as error:
        print(type(error).__name__, "|", error.problem, "|", " ".join(error.got.split())[-400:], "|", error.fix)

if __name__ == "__main__":
    tried(lambda ctx: 1)
    tried(5)
    tried(body, "", config="none.yaml")
    tried(body, "", config={"sed": 1})
    tried(body, "exit")
    tried(body, "result")
"""


def test_what_cannot_be_launched_says_why_and_what_to_do(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(BAD)
    env = os.environ | {"TMPDIR": str(tmp_path)}
    out = run(script, env)
    assert (out.returncode, out.stderr) == (0, "")
    lines = out.stdout.splitlines()
    expected = [
        ("LaunchError", "at the top level of a module"),
        ("LaunchError", "Got 5"),
        ("ConfigError", "none.yaml"),
        ("ConfigError", "use `seed`"),
        ("RankFailedError", "sys.exit(3)"),
        ("RankFailedError", "<lambda>"),
    ]
    assert len(lines) == len(expected)
    for line, (kind, said) in zip(lines, expected, strict=True):
        assert line.startswith(kind), lines
        assert said.removeprefix("Got ") in line
    left = [
        path.name for path in tmp_path.iterdir() if not path.name.startswith("pytorch-errorfile")
    ]  # torch's own
    assert left == ["script.py"]
    script.write_text("import faccel\nprint(faccel.launch(len, num_processes=2))\n")
    out = run(script, env)
    assert out.returncode == 1
    assert 'put the call below `if __name__ == "__main__":`' in out.stderr


@pytest.mark.filterwarnings("ignore")
def test_a_cell_of_a_notebook_trains_on_two_processes():
    cells = [
        "import os\nos.environ['OMP_NUM_THREADS'] = '1'\nimport faccel, torch",
        "torch.randn(200, 200) @ torch.randn(200, 200)  # the notebook has computed before",
        """
def train(ctx, rows):
    model = faccel.wrap(torch.nn.Linear(4, 1), ctx)
    opt = faccel.wrap_optimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, ctx)
    scaler = faccel.scaled_backward(model(torch.ones(rows, 4)).mean(), faccel.init_scaler(ctx), ctx)
    faccel.optimizer_step(opt, scaler, ctx)
    return ctx.rank, ctx.world_size
""",
        "print(faccel.notebook_launch(train, 8, num_processes=2))",
        "print(faccel.notebook_launch(train, 8, num_processes=1))",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in cells])
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    assert notebook.cells[3].outputs[0].text == "[(0, 2), (1, 2)]\n"
    assert notebook.cells[4].outputs[0].text == "[(0, 1)]\n"


def test_what_cannot_be_launched_says_so():
    with pytest.raises(ConfigError):
        faccel.launch(print, num_processes=0)
    code = "import faccel\nfaccel.launch(print, num_processes=2)"
    env = os.environ | {"RANK": "0", "WORLD_SIZE": "2"}
    out = subprocess.run(
        [sys.executable, "-c", code],
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert LaunchError.__name__ in out.stderr
