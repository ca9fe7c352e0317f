"""Runs every Python block of the README and of the pages under docs/."""

import importlib.util
import re
import types

import pytest
import torch

import faccel
from faccel.testing import simulate
from tests.docs import shown
from tests.docs.pages import README, blocks, page_id, pages

# Pages about a package that is an extra.
NEEDS = {"docs/low-precision.md": "torchao", "docs/inference.md": "transformers"}


def run_page(path, folder, namespace, contexts):
    """Run the blocks of a page in one namespace, then the tests that they define.

    Appends the contexts that the blocks make to `contexts`. Returns a sentence for each output that
    the page shows and that was not printed.
    """
    wrong, output, executed = [], None, []
    with shown.recorded() as printed:
        for block in shown.page_blocks(path):
            if block.is_file:
                (folder / block.title).write_text(block.source)
            if is_executed(block, path):
                executed.append(block)
                output = shown.run(block, namespace, printed)
                # After each block: a later one may use the same name for another context.
                contexts += [x for x in namespace.values() if isinstance(x, faccel.DistContext)]
            else:
                wrong += shown.wrong_output(block, output, folder)
                output = None
        run_tests(namespace)
    for block in executed:
        wrong += shown.wrong_comments(block, printed)
    return wrong


def run_tests(namespace):
    """Run the tests of a page."""
    for name, value in list(namespace.items()):
        if isinstance(value, types.FunctionType) and name.startswith("test_"):
            run_test(value)


def is_executed(block, path):
    """Return whether a block runs here; the files of the tutorials run in test_shell.py."""
    is_run_by_shell = block.is_file and path.parent.name in shown.FOLDERS
    return block.language == "python" and not is_run_by_shell and not block.is_side


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


def marked_pages():
    """Return the pages; those with a shell command take seconds."""
    params = []
    for path in pages():
        is_slow = any(block.is_session for block in shown.page_blocks(path))
        marks = pytest.mark.slow if is_slow else ()
        params.append(pytest.param(path, marks=marks, id=page_id(path)))
    return params


@pytest.mark.parametrize("path", marked_pages())
def test_the_blocks_of_a_page_run_and_print_what_it_shows(path, tmp_path, monkeypatch):
    if page_id(path) in NEEDS and importlib.util.find_spec(NEEDS[page_id(path)]) is None:
        pytest.skip(f"{NEEDS[page_id(path)]} is not installed")
    monkeypatch.chdir(tmp_path)
    torch.seed()  # as in the process of a reader: a page that shows random numbers seeds them
    contexts = []
    try:
        wrong = run_page(path, tmp_path, {"__name__": path.stem}, contexts)
    finally:
        for ctx in contexts:
            faccel.shutdown(ctx)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", pages(), ids=page_id)
def test_a_block_names_its_language(path):
    openings = re.findall(r"^```(\w*)", path.read_text(), re.M)
    assert set(openings[::2]) <= {"python", "bash", "sh", "text", "yaml"}


def test_ci_runs_the_first_two_commands_of_the_readme():
    run, test = blocks(README, "bash")[:2]
    assert run.startswith('pip install torch==2.13.0 -e ".[examples]" && faccel launch')
    assert run.rstrip().endswith("examples/digits.py")
    assert test.strip() == 'pip install torch==2.13.0 -e ".[test]" && pytest'


def block(source, language="python", reason=None):
    return shown.Block("page.md", language, None, source, 10, reason)


def test_a_comment_is_compared_with_what_its_line_printed():
    source = block("""x = 0.25
def later():
    print(x, "in a function")  # 0.25 in a function
print(
    x,
    sep=", ",
)  # 0.26
print(2 * x)  # 0.6
print(x)  # ...
print("no comment")
later()
if x > 1:
    print(x)  # 0.25
""")
    with shown.recorded() as printed:
        output = shown.run(source, {}, printed)
    assert output == "no comment\n"
    assert shown.wrong_comments(source, printed) == [
        "page.md:16 shows '0.26', and printed '0.25'",
        "page.md:17 shows '0.6', and printed '0.5'",
        "page.md:22 shows '0.25', and printed ''",
    ]


def test_a_line_that_several_ranks_run_has_the_output_of_all_of_them():
    source = block("""from faccel.testing import simulate
def fn(ctx):
    print(ctx.rank)  # 0 1
simulate(fn, 2)
""")
    with shown.recorded() as printed:
        shown.run(source, {}, printed)
    assert len(shown.wrong_comments(source, printed)) == 1  # two lines, not one


def test_a_text_that_is_not_the_output_is_found(tmp_path):
    assert shown.wrong_output(block("a\n...\n", "text"), "a\nb\n", tmp_path) == []
    assert len(shown.wrong_output(block("a\n", "text"), "a\nb\n", tmp_path)) == 1
    assert shown.wrong_output(block("a\n", "text", "compared: a reason"), "b\n", tmp_path) == []
    assert shown.wrong_output(block("$ echo a\na\n", "text"), None, tmp_path) == []
    assert shown.wrong_output(block("$ echo a; exit 3\na\n", "text"), None, tmp_path) == []
    assert len(shown.wrong_output(block("$ echo a\nb\n", "text"), None, tmp_path)) == 1
