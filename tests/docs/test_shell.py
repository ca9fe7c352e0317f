"""Runs the shell blocks of the pages under start and tutorials, with the files that they show.

A ```python block with a title is a file. A ```bash block runs in the folder of the files. The
```text block that follows it is its output, where `...` stands for any text and numbers may differ
by rounding. A ```sh block does not run; the comment before it gives the reason.
"""

import os
import re
import subprocess
import sys

import pytest

from tests.docs.pages import ROOT, page_id, pages

BLOCK = re.compile(r"^```(python title=\"([^\"]+)\"|bash|text)\n(.*?)^```", re.M | re.S)
FOLDERS = ("start", "tutorials")
PAGES = [path for path in pages() if path.parent.name in FOLDERS and "```bash" in path.read_text()]
NUMBER = re.compile(r"\d+\.\d+")
TOLERANCE = 0.02  # of a printed loss or accuracy, for another CPU


def run(command, folder):
    """Run a block as in a new shell, with this Python and these sources; return its output."""
    paths = [os.path.dirname(sys.executable), os.environ["PATH"]]
    env = os.environ | {"PATH": os.pathsep.join(paths), "PYTHONPATH": str(ROOT)}
    env.pop("PYTEST_ADDOPTS", None)  # of this run: it would change what `pytest` prints
    result = subprocess.run(
        ["bash", "-ec", command], cwd=folder, env=env, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def same_line(expected, line):
    """Return whether a line of output is the expected one."""
    if expected.endswith("..."):
        return line.startswith(expected.removesuffix("..."))
    numbers = [float(number) for number in NUMBER.findall(line)]
    others = [float(number) for number in NUMBER.findall(expected)]
    is_close = all(abs(a - b) <= TOLERANCE for a, b in zip(numbers, others, strict=False))
    return NUMBER.sub("0", line) == NUMBER.sub("0", expected) and is_close


@pytest.mark.slow
@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_the_shell_blocks_of_a_page_run(path, tmp_path):
    output = ""
    text = path.read_text()
    if path.stem == "first-test":  # it tests the script of the page before
        text = (path.parent / "first-run.md").read_text().partition("```bash")[0] + text
    for kind, name, source in BLOCK.findall(text):
        if name:
            (tmp_path / name).write_text(source)
        elif kind == "bash":
            output = run(source, tmp_path)
        else:
            lines = output.splitlines()
            for expected in source.splitlines():
                assert any(same_line(expected, line) for line in lines), (expected, output)


@pytest.mark.parametrize("path", pages(), ids=page_id)
def test_a_shell_block_of_a_new_page_that_does_not_run_has_a_reason(path):
    if path.parent.name in (*FOLDERS, "how-to", "mistakes", "explanation"):
        text = path.read_text()
        blocks = re.findall(r"^```sh$", text, re.M)
        reasons = re.findall(r"^<!-- not run: .+ -->\n```sh$", text, re.M)
        assert len(blocks) == len(reasons)


def test_a_number_may_differ_by_rounding_only():
    assert same_line("loss 0.187  ranks 2", "loss 0.191  ranks 2")
    assert not same_line("loss 0.187  ranks 2", "loss 0.291  ranks 2")
    assert not same_line("loss 0.187  ranks 2", "loss 0.187  ranks 1")
