"""Runs the shell blocks of the pages under start and tutorials, with the files that they show.

A ```python block with a title is a file. A ```bash block runs in the folder of the files. A ```sh
block does not run; the comment before it gives the reason. `shown.py` describes ```text blocks.
"""

import pytest

from tests.docs import shown
from tests.docs.pages import README, page_id, pages

BLOCKS = {path: shown.page_blocks(path) for path in pages()}
FILES = [path for path in pages() if path.parent.name in shown.FOLDERS]


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=page_id)
def test_the_shell_blocks_of_a_page_run(path, tmp_path):
    output = None
    page = BLOCKS[path]
    if path.stem == "first-test":  # it tests the script of the page before
        page = BLOCKS[path.parent / "first-run.md"][:1] + page
    for block in page:
        if block.is_file:
            (tmp_path / block.title).write_text(block.source)
        elif block.is_output and output is not None:
            assert shown.wrong_text(block.source, output, block) == []
        output = None
        if block.language == "bash":
            result = shown.run_shell(block.source, tmp_path)
            assert result.returncode == 0, result.stdout + result.stderr
            output = result.stdout


HELD = [path for path in pages() if path.stem != "coming-from-accelerate"]  # its blocks are pairs


@pytest.mark.parametrize("path", HELD, ids=page_id)
def test_a_shell_block_runs_or_has_a_reason(path):
    for block in BLOCKS[path]:
        if block.language == "bash":
            assert path == README or path.parent.name in shown.FOLDERS, block
        if block.language == "sh" and not block.is_side:
            assert (block.reason or "").startswith("run: "), block


@pytest.mark.parametrize("path", HELD, ids=page_id)
def test_an_output_is_compared_or_has_a_reason(path):
    before = None
    for block in BLOCKS[path]:
        if block.is_output:
            assert before is not None and before.language in ("python", "bash"), block
        if block.language == "text":
            assert (block.reason or "compared: ").startswith("compared: "), block
        before = block


@pytest.mark.parametrize(
    ("shown_text", "output", "is_same"),
    [
        ("loss 0.187  ranks 2", "loss 0.188  ranks 2", True),
        ("loss 0.187  ranks 2", "loss 0.189  ranks 2", False),
        ("loss 0.187  ranks 2", "loss 0.187  ranks 1", False),
        ("loss 0.187", "loss 0.187\nloss 0.101", False),
        ("2 passed in ...", "..\n2 passed in 0.31s", False),
        ("...\n2 passed in ...", "..\n2 passed in 0.31s", True),
        ("torch 2.13.0", "torch 2.13.1", False),
        ("accuracy 0.89", "accuracy 0.892", True),
        ("accuracy 0.89", "accuracy 0.90", False),
        ("parameters      8,030", "parameters  8,030", True),
        ("a b", "ab", False),
        ("tensor(3.2)", "tensor(3.2000)", True),
    ],
)
def test_a_number_may_differ_by_rounding_only(shown_text, output, is_same):
    assert shown.same_text(shown_text, output) is is_same
