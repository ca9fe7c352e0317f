"""Writes the pages of the reference from the code: names, commands, fields, errors, backends."""

import ast
import importlib
import inspect
import itertools
import pathlib
import re
import types

import attrs
import click

import faccel
from docs import docstrings
from faccel import device_table
from faccel.backends.table import table as backend_table
from faccel.cli.commands import main as command_line
from faccel.config import field_table
from faccel.effects import effects_of

PACKAGE = pathlib.Path(faccel.__file__).parent
# What a namespace is for, in the words of the navigation.
TITLES = {
    "faccel": "The loop",
    "faccel.backends": "For authors of backends",
    "faccel.checkpoint": "Checkpoints and exports",
    "faccel.comm": "Less frequent collectives",
    "faccel.data": "Datasets of tokens",
    "faccel.errors": "Every error, with cause and fix",
    "faccel.func": "Training as a pure function",
    "faccel.parallel": "Plans and parallelism",
    "faccel.random": "Random numbers",
    "faccel.testing": "Simulated worlds",
    "faccel.tracking": "Trackers and meters",
    "faccel.tree": "Nested values",
    "command-line": "Every command and option",
    "configuration": "Every field of `Config` and of a `Plan`",
    "backends": "What runs where, as tables",
}


def namespaces():
    """Return every public namespace: the package, and its modules that list public names."""
    names = [name for name, value in vars_of(faccel) if isinstance(value, types.ModuleType)]
    return ["faccel", *(f"faccel.{name}" for name in names)]


def vars_of(module):
    """Return `(name, value)` of a namespace, imported where it is lazy."""
    pairs = [(name, getattr(module, name)) for name in dir(module) if not name.startswith("_")]
    return [(name, value) for name, value in pairs if is_public(value)]


def is_public(value):
    """Return whether a value of a namespace belongs to the reference."""
    if isinstance(value, types.ModuleType):
        return value.__name__.startswith("faccel.") and bool(getattr(value, "__all__", ()))
    return True


def public_names():
    """Return every public name, such as `faccel.comm.scatter`, with its object."""
    names = {}
    for namespace in namespaces():
        module = importlib.import_module(namespace)
        for name in module.__all__:
            names[f"{namespace}.{name}"] = getattr(module, name)
    return names


def page_of(name):
    """Return the path of the page that has a public name, below the root of the site."""
    return f"reference/{name.rpartition('.')[0]}.md"


# --- names


def signature(name, value):
    """Return the call of a function or class as code, one argument per line if it is long."""
    try:
        parameters = list(inspect.signature(value).parameters.values())
    except (TypeError, ValueError):
        return name
    parts, has_star = [], False
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY and not has_star:
            parts.append("*")
        has_star |= parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL)
        parts.append(_parameter(parameter))
    line = f"{name}({', '.join(parts)})"
    if len(line) <= 80:
        return line
    return f"{name}(\n    " + ",\n    ".join(parts) + ",\n)"


def _parameter(parameter):
    text = str(parameter.replace(annotation=parameter.empty))
    if parameter.default is parameter.empty:
        return text
    if isinstance(parameter.default, str | int | float | bool | None | tuple):
        return f"{parameter.name}={parameter.default!r}".replace("'", '"')
    return f"{parameter.name}=..."


def members(cls):
    """Return the public methods and properties that a class defines, with their signatures."""
    rows = []
    for name, member in vars(cls).items():
        value = member.__func__ if isinstance(member, classmethod | staticmethod) else member
        if name.startswith("_") or not getattr(value, "__doc__", None):
            continue
        if isinstance(value, property):
            rows.append((name, docstrings.read(value)))
        elif inspect.isfunction(value):
            text = signature(name, value).replace("(self, ", "(").replace("(self)", "()")
            rows.append((" ".join(text.split()), docstrings.read(value)))
    return rows


def entry(full_name, value, guide):
    """Return the Markdown of one public name."""
    name = full_name.rpartition(".")[2]
    parts = [f"## {name} {{ #{full_name} }}"]
    if not callable(value):
        parts.append(_value_doc(full_name))
        return "\n\n".join([*parts, guide])
    parts.append(f"```python\n{signature(full_name, value)}\n```")
    doc = docstrings.read(value)
    if inspect.isfunction(value) and not doc.effects:
        doc = attrs.evolve(doc, effects=", ".join(sorted(effects_of(value))) or "pure.")
    parts.append(docstrings.markdown(doc))
    if inspect.isclass(value):
        rows = [f"- `{call}`: {doc.summary}" for call, doc in members(value)]
        if rows:
            parts.append("**Methods and properties**\n\n" + "\n".join(rows))
    return "\n\n".join([*parts, guide])


def _value_doc(full_name):
    """Return the text below the assignment of a public value, which Python does not keep."""
    namespace, _, name = full_name.rpartition(".")
    package = PACKAGE.joinpath(*namespace.split(".")[1:])
    for path in sorted(package.rglob("*.py")):
        body = ast.parse(path.read_text()).body
        for statement, following in itertools.pairwise(body):
            target = getattr(statement, "target", None)
            if isinstance(target, ast.Name) and target.id == name:
                return inspect.cleandoc(following.value.value)
    raise LookupError(full_name)


def namespace_page(namespace, guides):
    """Return the page of a namespace; `guides` has the page that explains each name."""
    module = importlib.import_module(namespace)
    parts = [f"# {namespace}", TITLES.get(namespace, "Public names") + "."]
    names = [f"{namespace}.{name}" for name in module.__all__]
    for name in names:
        guide = guides.get(name)
        link = f"Guide: [{guide[0]}](../{guide[1]})." if guide else ""
        parts.append(entry(name, public_names()[name], link))
    return "\n\n".join(parts) + "\n"


# --- errors


@attrs.frozen
class RaisedMessage:
    """A message that the package raises.

    Args:
        problem: The first part, with `...` for values.
        fix: What to do, with `...` for values.
    """

    problem: str
    fix: str


def raised_messages():
    """Return the messages of each error class, read from the source."""
    messages = {name: set() for name in faccel.errors.__all__}
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            name = getattr(getattr(node, "func", None), "id", None)
            if name in messages and node.args:
                problem = _text(node.args[0])
                fix = "".join(_text(word.value) for word in node.keywords if word.arg == "fix")
                if problem:
                    messages[name].add(RaisedMessage(problem, fix))
    return messages


def _text(node):
    """Return a literal text of the source, with `...` in place of each value."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return "..."
    if isinstance(node, ast.BinOp):
        return _text(node.left) + _text(node.right)
    return ""


def errors_page(guides):
    """Return the page of errors: each class, then what it is raised for and what to do."""
    parts = [
        "# Errors",
        "Every error of faccel is a `FaccelError` and the builtin that fits. It has three parts, "
        "which are attributes: `problem`, `got` and `fix`. The tables list the problems of each "
        "class, read from the source; `...` stands for a value of your script.",
    ]
    messages = raised_messages()
    for name in faccel.errors.__all__:
        cls = getattr(faccel.errors, name)
        bases = ", ".join(f"`{base.__name__}`" for base in cls.__bases__)
        doc = docstrings.read(cls)
        parts.append(f"## {name} {{ #faccel.errors.{name} }}")
        parts.append(f"{docstrings.markdown(doc)}\n\nBases: {bases}.")
        guide = guides.get(f"faccel.errors.{name}")
        if guide:
            parts.append(f"Guide: [{guide[0]}](../{guide[1]}).")
        rows = sorted(messages[name], key=lambda message: message.problem.strip("`. ").lower())
        if rows:
            parts.append("| problem | to fix |\n| --- | --- |\n" + "\n".join(map(_error_row, rows)))
    return "\n\n".join(parts) + "\n"


def _error_row(message):
    return f"| {cell(message.problem)} | {cell(message.fix)} |"


def cell(text):
    """Return a text for a cell of a table, where `|` separates cells."""
    text = " ".join(text.split()).replace("|", "\\|")
    # Outside of code, an angle bracket would begin a tag.
    parts = text.split("`")
    for i in range(0, len(parts), 2):
        parts[i] = parts[i].replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")
    return "`".join(parts)


# --- the command line


def commands(command=command_line, name="faccel"):
    """Return `(name, command)` of every command, groups included."""
    rows = [(name, command)]
    if isinstance(command, click.Group):
        for child in sorted(command.commands):
            rows += commands(command.commands[child], f"{name} {child}")
    return rows


def command_page():
    """Return the page of all commands and options."""
    parts = [
        "# The command line",
        "Every command and option, from the definitions that `--help` prints. Every field of the "
        "[configuration](configuration.md) is an option of `faccel launch` and `faccel test`.",
    ]
    for name, command in commands():
        context = click.Context(command, info_name=name)
        usage = " ".join(command.collect_usage_pieces(context))
        help_text = inspect.cleandoc(command.help or "").replace("\b\n", "")
        parts += [f"## {name}", f"```text\n{name} {usage}\n```", cell_free(help_text)]
        rows = [_option_row(param) for param in command.params if isinstance(param, click.Option)]
        if rows:
            parts.append("| option | meaning | default |\n| --- | --- | --- |\n" + "\n".join(rows))
    return "\n\n".join(parts) + "\n"


def cell_free(text):
    """Return the help of a command as Markdown: names in capitals and options are code."""
    return text.replace("<", "&lt;").replace("*", "\\*")


def _option_row(option):
    names = ", ".join(f"`{name}`" for name in [*option.opts, *option.secondary_opts])
    values = ""
    if not option.is_flag:
        values = f" {option.make_metavar(click.Context(command_line))}"
    default = ""
    is_text = isinstance(option.default, str | int | float) and not isinstance(option.default, bool)
    if is_text and not option.is_flag:
        default = f"`{option.default}`"
    return f"| {names}{values.replace('|', ' or ')} | {cell(option.help or '')} | {default} |"


# --- configuration, backends, devices


def configuration_page():
    """Return the page of all fields of `Config`, and of the records of a `Plan`."""
    parts = [
        "# Configuration fields",
        "How the sources are merged: see [configuration](../configuration.md).",
        "## Fields of Config",
        field_table(),
        "## Fields of a plan",
        "A key of the section `plan` in a file, of `--plan` and of `FACCEL_PLAN`; fields of a "
        "record are written with a dot: `fsdp.prefetch=1`.",
    ]
    for name, record in plan_records():
        rows = ["| field | default | meaning |", "| --- | --- | --- |"]
        meanings = dict(docstrings.items(docstrings.read(record).sections["Args"]))
        rows += [
            f"| `{field.name}` | {_default(field)} | {cell(meanings[field.name])} |"
            for field in attrs.fields(record)
        ]
        parts += [f"### {name}", "\n".join(rows)]
    return "\n\n".join(parts) + "\n"


def plan_records():
    """Return `(name, class)` of `Plan` and of the records of its fields."""
    names = [name for name in faccel.parallel.__all__ if attrs.has(getattr(faccel.parallel, name))]
    records = {"Plan": faccel.Plan}
    # Annotations are texts; a record of a record follows in the next round.
    for _ in range(2):
        types_ = " ".join(str(f.type) for record in records.values() for f in attrs.fields(record))
        for name in names:
            if re.search(rf"\b{name}\b", types_):
                records.setdefault(name, getattr(faccel.parallel, name))
    return list(records.items())


def _default(field):
    if field.default is attrs.NOTHING:
        return "required"
    if isinstance(field.default, attrs.Factory) or attrs.has(type(field.default)):
        return "a record of defaults"
    return f"`{field.default!r}`"


def backends_page():
    """Return the tables of backends and devices."""
    parts = [
        "# Backends and devices",
        "What runs where, from the records that choose it. See [hardware](../hardware.md).",
        f"## Backends\n\n{backend_table()}",
        f"## Devices\n\n{device_table.table()}",
    ]
    return "\n\n".join(parts) + "\n"


def pages(guides):
    """Return the text of every page of the reference by its file name, in the navigation's order.

    Args:
        guides: `(title, path)` of the page that explains a public name.
    """
    result = {}
    for namespace in namespaces():
        if namespace != "faccel.errors":
            result[f"{namespace}.md"] = namespace_page(namespace, guides)
    result["command-line.md"] = command_page()
    result["configuration.md"] = configuration_page()
    result["backends.md"] = backends_page()
    result["faccel.errors.md"] = errors_page(guides)
    return result
