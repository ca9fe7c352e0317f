"""Compares the outputs that a page shows with what its blocks print.

The comment after a `print` is what that line prints. A ```text block after a ```python or a ```bash
block is what the block prints, without the lines that have a comment. A ```text block that begins
with `$` is a shell command and its output. In all of them `...` stands for any text, as in doctest,
a number with decimals is compared to the precision that the page writes, and spaces may be more.
Other ```text blocks have a comment before them: `<!-- not compared: the reason -->`.
"""

import ast
import contextlib
import io
import os
import re
import subprocess
import sys
import tokenize

import attrs

from tests.docs.pages import ROOT, page_id

FOLDERS = ("start", "tutorials")  # on these pages ```bash runs, with the files
_FENCE = re.compile(
    r"^(?:<!-- not (?P<reason>(?:run|compared): [^\n]+) -->\n)?"
    r"```(?P<language>\w+)(?: title=\"(?P<title>[^\"]+)\")?\n(?P<source>.*?)^```$",
    re.M | re.S,
)
_FLEXIBLE = re.compile(r"\.\.\.|(?<![\w.])-?\d+\.\d+(?![\w.])")


@attrs.frozen
class Block:
    """A fenced block of a page.

    Args:
        page: The name of the page.
        language: The word after the fence.
        title: The name of its file; another text for a side of a pair of snippets; or None.
        source: The lines between the fences.
        line: The line of the page on which `source` begins.
        reason: The comment before it, as in `compared: times differ`, or None.
    """

    page: str
    language: str
    title: str | None
    source: str
    line: int
    reason: str | None

    @property
    def is_session(self):
        """Whether the block is a shell command and its output."""
        return self.language == "text" and self.source.startswith("$ ")

    @property
    def is_output(self):
        """Whether the block is the output of the block before it."""
        return self.language == "text" and not self.is_session and self.reason is None

    @property
    def is_file(self):
        """Whether the title is the name of a file."""
        return self.title is not None and "." in self.title

    @property
    def is_side(self):
        """Whether the block is one of two libraries' snippets, side by side."""
        return self.title is not None and not self.is_file

    @property
    def file(self):
        """The file name with which the block is compiled."""
        return self.title or self.page

    @property
    def code(self):
        """The source, on the lines that it has in its file."""
        return self.source if self.title else "\n" * (self.line - 1) + self.source


def page_blocks(path):
    """Return the fenced blocks of a page in order."""
    text = path.read_text()
    result = []
    for match in _FENCE.finditer(text):
        line = text.count("\n", 0, match.start("source")) + 1
        fields = match.group("language", "title", "source")
        result.append(Block(page_id(path), *fields, line, match["reason"]))
    return result


def same_text(expected, output):
    """Return whether an output is the shown one."""
    pattern, numbers, end = "", [], 0
    for match in _FLEXIBLE.finditer(expected):
        pattern += re.escape(expected[end : match.start()])
        end = match.end()
        if match[0] == "...":
            pattern += ".*?"
        else:
            pattern += r"(-?\d+\.\d+)"
            numbers.append(match[0])
    pattern = re.sub(r"(\\ )+", " +", pattern + re.escape(expected[end:]))
    same = re.fullmatch(pattern, output, re.S)
    return same is not None and all(map(_same_number, numbers, same.groups()))


def _same_number(expected, number):
    unit = 10.0 ** -len(expected.partition(".")[2])  # of the last digit that the page writes
    # Another CPU rounds otherwise. One unit of two digits would be another result.
    tolerance = unit if unit < 0.005 else unit / 2
    return abs(float(expected) - float(number)) <= 1.001 * tolerance


class Printed(io.TextIOBase):
    """A stream that records which line of which block wrote each text."""

    def __init__(self):
        self.texts = []
        self.files = set()

    def write(self, text):
        frame = sys._getframe(1)
        while frame is not None and frame.f_code.co_filename not in self.files:
            frame = frame.f_back
        line = None
        if frame is not None:
            line = (frame.f_code.co_filename, frame.f_lineno)
        self.texts.append((line, text))
        return len(text)


@contextlib.contextmanager
def recorded():
    """Record what is printed in the body, with its lines."""
    printed = Printed()
    with contextlib.redirect_stdout(printed):
        yield printed


def comments_of_prints(block):
    """Return the comment of each print statement that has one, by its lines `(file, line)`."""
    comments = {}
    for token in tokenize.generate_tokens(io.StringIO(block.code).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.string.removeprefix("#").strip()
    result = {}
    for node in ast.walk(ast.parse(block.code)):
        if _is_print(node) and node.end_lineno in comments:
            lines = tuple((block.file, i) for i in range(node.lineno, node.end_lineno + 1))
            result[lines] = comments[node.end_lineno]
    return result


def _is_print(node):
    if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
        return False
    function = node.value.func
    return "print" in (getattr(function, "attr", ""), getattr(function, "id", ""))


def run(block, namespace, printed):
    """Execute a ```python block; return what it printed on lines without a comment."""
    printed.files.add(block.file)
    begin = len(printed.texts)
    exec(compile(block.code, block.file, "exec"), namespace)
    commented = {line for lines in comments_of_prints(block) for line in lines}
    return "".join(text for line, text in printed.texts[begin:] if line not in commented)


def wrong_comments(block, printed):
    """Return a sentence for each comment of a print that is not what was printed."""
    sentences = []
    for lines, comment in comments_of_prints(block).items():
        output = "".join(text for line, text in printed.texts if line in lines).strip()
        if not same_text(comment, output):
            file, line = lines[-1]
            sentences.append(f"{file}:{line} shows {comment!r}, and printed {output!r}")
    return sentences


def wrong_text(expected, output, block):
    """Return a list with a sentence if a block shows another output, else an empty list."""
    if same_text(expected.strip(), output.strip()):
        return []
    return [f"{block.page}:{block.line} shows\n{expected}\nand printed\n{output}"]


def run_shell(command, folder):
    """Run a block as in a new shell, with this Python and these sources."""
    paths = [os.path.dirname(sys.executable), os.environ["PATH"]]
    env = os.environ | {"PATH": os.pathsep.join(paths), "PYTHONPATH": str(ROOT)}
    env.pop("PYTEST_ADDOPTS", None)  # of this run: it would change what `pytest` prints
    return subprocess.run(
        ["bash", "-ec", command], cwd=folder, env=env, capture_output=True, text=True, timeout=600
    )


def wrong_output(block, output, folder):
    """Return a list with a sentence if a block shows another output, else an empty list.

    Args:
        block: A block that is not executed.
        output: What the block before it printed, or None if that was not executed.
        folder: Where a command runs.
    """
    if block.is_session and block.reason is None:
        return _wrong_session(block, folder)
    if block.is_output and output is not None:
        return wrong_text(block.source, output, block)
    return []


def _wrong_session(block, folder):
    command, _, expected = block.source.removeprefix("$ ").partition("\n")
    result = run_shell(command, folder)
    # A terminal shows both. What libraries warn about is not on the page.
    if same_text(expected.strip(), result.stdout.strip()):
        return []
    return wrong_text(expected, result.stdout + result.stderr, block)
