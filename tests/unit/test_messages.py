"""Every message shortens the user's values, and every text file is UTF-8, in the whole package."""

import ast
import pathlib

import pytest

import faccel

PACKAGE = pathlib.Path(faccel.__file__).parent
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")}
PARTS = ("problem", "got", "fix")
# Generated code, and names of leaves, which must stay complete.
COMPLETE = ("errors.py", "launching/accelerate_plan.py")


def messages(tree):
    """Yield each expression that becomes a part of a message of an error."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name.endswith(("Error", "error")):
                yield from node.args
                yield from (keyword.value for keyword in node.keywords)
            yield from (keyword.value for keyword in node.keywords if keyword.arg in PARTS)
        if isinstance(node, ast.Assign | ast.AugAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(ast.unparse(target) in PARTS for target in targets):
                yield node.value


def is_unlimited(node):
    """Return whether an expression prints the full repr of a value."""
    if isinstance(node, ast.FormattedValue):
        return node.conversion == ord("r")
    return isinstance(node, ast.Call) and ast.unparse(node.func) == "repr"


def test_no_message_prints_the_full_repr_of_a_value():
    hits = []
    num_messages = 0
    for path, tree in TREES.items():
        for message in messages(tree):
            num_messages += 1
            for node in ast.walk(message):
                if is_unlimited(node) and not str(path).endswith(COMPLETE):
                    hits.append(f"{path}:{node.lineno}: {ast.unparse(node)}")
    assert num_messages > 1000
    assert not hits, "use `faccel.errors.short_repr`:\n" + "\n".join(sorted(set(hits)))


def opens_text(call):
    """Return whether a call opens a file as text: `open` in a text mode, or `read_text`."""
    name = ast.unparse(call.func).rpartition(".")[2]
    if name in ("read_text", "write_text") and isinstance(call.func, ast.Attribute):
        return ast.unparse(call.func) != "config_format.read_text"
    words = [value.value for value in call.args if isinstance(value, ast.Constant)]
    words += [k.value.value for k in call.keywords if isinstance(k.value, ast.Constant)]
    mode = next((word for word in words if word in ("r", "w", "a", "x", "r+", "w+")), None)
    if ast.unparse(call.func) == "open":
        return not any(isinstance(word, str) and "b" in word for word in words)
    return name in ("open", "NamedTemporaryFile", "fdopen") and mode is not None


@pytest.mark.parametrize(
    ("code", "is_text"),
    [
        ("open(path)", True),
        ("open(path, 'w')", True),
        ("open(path, mode='a')", True),
        ("open(path, 'rb')", False),
        ("path.open('a')", True),
        ("path.open('ab')", False),
        ("os.open(path, flags)", False),
        ("path.read_text()", True),
        ("tempfile.NamedTemporaryFile('w')", True),
        ("tempfile.NamedTemporaryFile()", False),
    ],
)
def test_text_files_are_recognized(code, is_text):
    assert opens_text(ast.parse(code, mode="eval").body) is is_text


def test_every_text_file_is_utf_8_in_every_locale():
    hits = []
    num_files = 0
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and opens_text(node):
                num_files += 1
                if not any(keyword.arg == "encoding" for keyword in node.keywords):
                    hits.append(f"{path}:{node.lineno}: {ast.unparse(node)}")
    assert num_files > 5
    assert not hits, 'add `encoding="utf-8"`:\n' + "\n".join(hits)
