"""Reads the pairs of snippets of docs/accelerate, and runs the snippets of faccel.

A section `### B5 title` has one block titled "Accelerate" and one titled "faccel". A snippet of
faccel runs after the page's first block, on two simulated ranks. If it begins with
`ctx = faccel.init(...)`, these arguments configure the simulated world; if it calls `init`,
`launch` or `notebook_launch` later, it runs in this process. A comment before the pair changes
that: `<!-- ranks: 4 -->`, `<!-- one process -->`, `<!-- needs: package -->` or
`<!-- not run: why -->`.
"""

import ast
import math
import re

import attrs

import faccel
from faccel.testing import simulate
from tests.docs.pages import ROOT, blocks

FOLDER = ROOT / "docs" / "accelerate"
SECTION = re.compile(r"^### ([A-L]\d+) (.*?)$\n(.*?)(?=^##+ |\Z)", re.M | re.S)
BLOCK = re.compile(r'^```(\w+) title="(Accelerate|faccel)"\n(.*?)^```', re.M | re.S)
COMMENT = re.compile(r"^<!-- (ranks|one process|needs|not run)(?:: (.+?))? -->$", re.M)
IN_THIS_PROCESS = ("faccel.init(", "faccel.launch(", "faccel.notebook_launch(")


@attrs.frozen
class Snippet:
    """One block: its language, the library of its title, and its source."""

    language: str
    library: str
    source: str


@attrs.frozen
class Pair:
    """One section: the row of the table, its title, the blocks, and how to run them."""

    page: str
    preamble: str
    row: str
    title: str
    snippets: tuple[Snippet, ...]
    options: dict[str, str]

    def of(self, library, language):
        """Return the sources of a library in a language."""
        return [x.source for x in self.snippets if (x.library, x.language) == (library, language)]


def read_pairs():
    """Return the pairs of all pages, page by page."""
    pairs = []
    for path in sorted(FOLDER.glob("*.md")):
        text = path.read_text()
        preamble = "\n".join(blocks(path, "python")[:1])
        for row, title, body in SECTION.findall(text):
            snippets = tuple(Snippet(*match) for match in BLOCK.findall(body))
            pairs.append(
                Pair(path.stem, preamble, row, title, snippets, dict(COMMENT.findall(body)))
            )
    return pairs


def _configuration(block):
    """Return the arguments of a first line `ctx = faccel.init(...)`, and the other statements."""
    tree = ast.parse(block)
    first = tree.body[0]
    is_init = isinstance(first, ast.Assign) and ast.unparse(first).startswith("ctx = faccel.init(")
    if not is_init or first.value.args:
        return {}, tree
    config = {word.arg: ast.literal_eval(word.value) for word in first.value.keywords}
    return config, ast.Module(tree.body[1:], [])


def _num_ranks(pair, config):
    """Return the number of ranks: 2 where the mesh leaves it open."""
    if "ranks" in pair.options:
        return int(pair.options["ranks"])
    sizes = dict(axis.split("=") for axis in config.get("mesh", "dp_replicate=-1").split(","))
    sizes.pop("ep", None)  # a view of other axes
    return math.prod(2 if size == "-1" else int(size) for size in sizes.values())


def run(pair, block):
    """Run a snippet of faccel after the first block of its page."""
    name = f"docs/accelerate/{pair.page}.md {pair.row}"
    config, statements = _configuration(block)
    in_this_process = any(call in ast.unparse(statements) for call in IN_THIS_PROCESS)
    if in_this_process or "one process" in pair.options:
        namespace = {"__name__": name}
        try:
            exec(compile(pair.preamble + block, name, "exec"), namespace)
        finally:
            for value in namespace.values():
                if isinstance(value, faccel.DistContext):
                    faccel.shutdown(value)
        return
    preamble = pair.preamble.replace("ctx = faccel.init()\n", "")
    program = [compile(preamble, name, "exec"), compile(statements, name, "exec")]

    def run_rank(ctx):
        namespace = {"__name__": name, "ctx": ctx}
        for code in program:
            exec(code, namespace)

    simulate(run_rank, _num_ranks(pair, config), config=config)
