"""Runs every Python block of the README and of the pages under docs/."""

import importlib.util
import re
import types

import pytest

import faccel
from faccel.testing import simulate
from tests.docs.pages import README, blocks, page_id, pages

# Pages about a package that is an extra.
NEEDS = {"docs/low-precision.md": "torchao", "docs/inference.md": "transformers"}


def run_page(path, namespace, contexts):
    """Run the blocks of a page in one namespace, then the tests that they define.

    Appends the contexts that the blocks make to `contexts`.
    """
    for source in blocks(path, "python"):
        exec(compile(source, page_id(path), "exec"), namespace)
        # After each block: a later one may use the same name for another context.
        contexts += [x for x in namespace.values() if isinstance(x, faccel.DistContext)]
    for name, value in list(namespace.items()):
        if isinstance(value, types.FunctionType) and name.startswith("test_"):
            run_test(value)


def run_test(function):
    """Run a test as pytest does: on every rank of simulated worlds, if it has the marker."""
    world_sizes = [
        size
        for mark in getattr(function, "pytestmark", [])
        if mark.name == "world_size"
        for size in mark.args
    ]
    for size in world_sizes:
        simulate(function, size)
    if not world_sizes:
        function()


@pytest.mark.parametrize("path", pages(), ids=page_id)
def test_the_blocks_of_a_page_run(path, tmp_path, monkeypatch):
    if page_id(path) in NEEDS and importlib.util.find_spec(NEEDS[page_id(path)]) is None:
        pytest.skip(f"{NEEDS[page_id(path)]} is not installed")
    monkeypatch.chdir(tmp_path)
    contexts = []
    try:
        run_page(path, {"__name__": path.stem}, contexts)
    finally:
        for ctx in contexts:
            faccel.shutdown(ctx)


@pytest.mark.parametrize("path", pages(), ids=page_id)
def test_a_block_names_its_language(path):
    openings = re.findall(r"^```(\w*)", path.read_text(), re.M)
    assert set(openings[::2]) <= {"python", "bash", "sh", "text", "yaml"}


def test_ci_runs_the_first_two_commands_of_the_readme():
    run, test = blocks(README, "bash")[:2]
    assert run.startswith('pip install torch==2.13.0 -e ".[examples]" && faccel launch')
    assert run.rstrip().endswith("examples/digits.py")
    assert test.strip() == 'pip install torch==2.13.0 -e ".[test]" && pytest'
