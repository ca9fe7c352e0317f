"""How a Python package reads, in figures: faccel beside the packages that its style follows.

    python benchmarks/style.py [package ...]

Prints one column for each package that is installed. `--files faccel/data` prints one row for each
file instead.
"""

import argparse
import ast
import importlib.util
import io
import pathlib
import re
import tokenize
from collections import Counter

# Names that do not state what a value is. As local names they are replaced by what the value is.
# `tests/unit/test_words.py` bans more of them, together with words of prose.
PRONOUNS = frozenset(
    {
        *(
            "each",
            "found",
            "own",
            "mine",
            "ours",
            "theirs",
            "held",
            "given",
            "made",
            "place",
            "places",
        ),
        *("part", "parts", "whole", "rest", "named", "asked", "taken", "kept", "here", "there"),
        *("thing", "things"),
    }
)
LIMITS = {
    "pronoun-like names": 0.5,
    "Any": 12.0,
    "conditional expressions": 8.0,
    "comprehensions": 12.0,
    "elif": 1.5,
    "lines over 100 characters": 0.0,
    "private names imported": 0.0,
    "upward imports": 0.0,
    "import cycles": 0.0,
}
MIN_COMMENTS = 8.0  # per 100 lines of code


def sources(package):
    """Return the Python files of a package without its tests, sorted."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return []
    origin = pathlib.Path(spec.origin)
    if origin.name != "__init__.py":
        return [origin]
    files = sorted(origin.parent.rglob("*.py"))
    return [
        file
        for file in files
        if not re.search(r"(^|[/_])tests?([/_.]|$)", str(file.relative_to(origin.parent)))
    ]


def bound_names(tree):
    """Yield every name that is bound: assignments, loops, arguments, `with` and `except`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.ExceptHandler) and node.name:
            yield node.name


def docstring_lines(tree):
    """Return the numbers of all lines that belong to a docstring."""
    numbers = set()
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
            continue
        if isinstance(node.value.value, str):
            numbers.update(range(node.lineno, node.end_lineno + 1))
    return numbers


COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def num_private(node):
    """Return how many names with a leading underscore an import takes from another module."""
    if not isinstance(node, ast.ImportFrom) or node.module == "__future__":
        return 0
    names = [alias.name for alias in node.names]
    return sum(name.startswith("_") and not name.endswith("__") for name in names)


def count_nodes(tree):
    """Count the constructs that the syntax tree shows."""
    counts = Counter()
    for node in ast.walk(tree):
        counts["conditional expressions"] += isinstance(node, ast.IfExp)
        counts["comprehensions"] += isinstance(node, COMPREHENSIONS)
        counts["Any"] += isinstance(node, ast.Name) and node.id == "Any"
        counts["private names imported"] += num_private(node)
    counts["pronoun-like names"] = sum(name in PRONOUNS for name in bound_names(tree))
    return counts


def count(text):
    """Count the constructs of one file."""
    tree = ast.parse(text)
    counts = count_nodes(tree)
    code = set()
    comments = set()
    layout = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        is_comment = token.type == tokenize.COMMENT
        if is_comment and not re.match(r"#\s*(noqa|type:|pyright:|fmt:)", token.string):
            comments.add(token.start[0])
        if not is_comment and token.type not in layout:
            code.update(range(token.start[0], token.end[0] + 1))
        counts["elif"] += token.type == tokenize.NAME and token.string == "elif"
    counts["lines"] = len(text.splitlines())
    counts["code lines"] = len(code - docstring_lines(tree))
    counts["comments"] = len(comments)
    counts["lines over 100 characters"] = sum(len(line) > 100 for line in text.splitlines())
    return counts


def imports_of(package, files):
    """Return the modules of the package that each of its modules imports at its top level."""
    root = files[0].parent
    while root.name != package:
        root = root.parent
    names = {}
    for file in files:
        path = (package, *file.relative_to(root).with_suffix("").parts)
        names[".".join(path).removesuffix(".__init__")] = file
    graph = {}
    for name, file in names.items():
        targets = set()
        for node in ast.parse(
            file.read_text()
        ).body:  # lazy imports and `TYPE_CHECKING` cannot be a cycle
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                modules = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            targets.update(module for module in modules if module in names and module != name)
        graph[name] = targets
    return graph


def num_cycles(graph):
    """Return how many modules import themselves over others."""
    cyclic = 0
    for start in graph:
        seen = set()
        stack = list(graph[start])
        while stack:
            module = stack.pop()
            if module not in seen:
                seen.add(module)
                stack.extend(graph[module])
        cyclic += start in seen
    return cyclic


def num_upward(package, graph, layers):
    """Return how many imports go from a layer to one above it or beside it.

    `layers` lists the rows, top first.
    """
    row_of = {name: i for i, row in enumerate(layers) for name in row}
    upward = 0
    for module, targets in graph.items():
        source = module.removeprefix(package).lstrip(".").partition(".")[0]
        for target in targets:
            goal = target.removeprefix(package).lstrip(".").partition(".")[0]
            if source in row_of and goal in row_of and source != goal:
                upward += row_of[goal] <= row_of[source]
    return upward


def measure(package, layers=()):
    """Return the figures of a package; None if it is not installed.

    Counts are per 1000 lines, comments per 100 lines of code.
    """
    files = sources(package)
    if not files:
        return None
    total = Counter()
    for file in files:
        total += count(file.read_text())
    figures = {}
    for name in LIMITS:
        figures[name] = 1000 * total[name] / total["lines"]
    graph = imports_of(package, files)
    for name in ("lines over 100 characters", "private names imported"):
        figures[name] = float(total[name])
    figures["upward imports"] = float(num_upward(package, graph, layers))
    figures["import cycles"] = float(num_cycles(graph))
    figures["comments"] = 100 * total["comments"] / total["code lines"]
    figures["lines"] = float(total["lines"])
    return figures


def layers_of_faccel():
    """Return the layers that `pyproject.toml` states, top first."""
    import tomllib

    root = pathlib.Path(__file__).parents[1]
    config = tomllib.loads((root / "pyproject.toml").read_text())
    contracts = config["tool"]["importlinter"]["contracts"]
    (contract,) = [entry for entry in contracts if entry["type"] == "layers"]
    return [[name.strip() for name in row.split("|")] for row in contract["layers"]]


def print_files(paths):
    """Print the raw counts of each file, and the rates of all together."""
    names = [name for name in LIMITS if "import" not in name]
    header = " ".join(f"{name[:9]:>9}" for name in names)
    print(f"{'file':48} {'lines':>6} {'code':>5} {'#':>4} {header}")
    total = Counter()
    for path in paths:
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            counts = count(file.read_text())
            total += counts
            cells = " ".join(f"{counts[name]:9d}" for name in names)
            numbers = f"{counts['lines']:6d} {counts['code lines']:5d} {counts['comments']:4d}"
            print(f"{file!s:48} {numbers} {cells}")
    rates = " ".join(f"{1000 * total[name] / max(1, total['lines']):9.1f}" for name in names)
    share = 100 * total["comments"] / max(1, total["code lines"])
    title = "per 1000 lines; comments per 100 lines of code"
    print(f"{title:48} {total['lines']:6d} {total['code lines']:5d} {share:4.1f} {rates}")


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("packages", nargs="*", default=["faccel", "equinox", "optax", "accelerate"])
    parser.add_argument("--files", nargs="+", type=pathlib.Path)
    options = parser.parse_args()
    if options.files:
        print_files(options.files)
        return
    columns = {}
    for package in options.packages:
        figures = measure(package, layers_of_faccel() if package == "faccel" else ())
        if figures is not None:
            columns[package] = figures
    print(f"{'per 1000 lines':32} {'limit':>6} " + " ".join(f"{name:>11}" for name in columns))
    for name in [*LIMITS, "comments", "lines"]:
        limit = {**LIMITS, "comments": MIN_COMMENTS}.get(name)
        cells = " ".join(f"{figures[name]:11.1f}" for figures in columns.values())
        print(f"{name:32} {'' if limit is None else limit:>6} {cells}")


if __name__ == "__main__":
    main()
