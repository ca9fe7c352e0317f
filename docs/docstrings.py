"""Reads docstrings in Google's style with an `Effects:` line, and writes them as Markdown."""

import inspect
import re
import textwrap

import attrs

SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises", "Examples")
_TITLES = {"Args": "Arguments", "Examples": "Example"}
_HEADING = re.compile(rf"^({'|'.join(SECTIONS)}):$")
_ITEM = re.compile(r"^(\*{0,2}\w[\w.]*)(?: \([^)]*\))?: (.*)$", re.S)


@attrs.frozen
class Docstring:
    """The parts of a docstring.

    Args:
        summary: Its first paragraph.
        effects: What follows `Effects:`, or an empty text.
        body: The other paragraphs before the first section.
        sections: The text of each section by its name, without indentation.
    """

    summary: str
    effects: str
    body: str
    sections: dict[str, str]


def read(value):
    """Return the docstring of a function, a class or a property."""
    lines = (inspect.getdoc(value) or "").splitlines()
    paragraphs, sections = [], {}
    section = None
    for line in lines:
        heading = _HEADING.match(line)
        if heading:
            section = heading[1]
            sections[section] = []
        elif section is None:
            paragraphs.append(line)
        elif line and not line.startswith(" "):  # a paragraph after the section
            section = None
            paragraphs += ["", line]
        else:
            sections[section].append(line)
    texts = [text.strip() for text in "\n".join(paragraphs).split("\n\n") if text.strip()]
    effects = [text.removeprefix("Effects: ") for text in texts if text.startswith("Effects:")]
    others = [text for text in texts if not text.startswith("Effects:")]
    return Docstring(
        summary=" ".join(others[:1]),
        effects=" ".join(effects),
        body="\n\n".join(others[1:]),
        sections={name: textwrap.dedent("\n".join(body)) for name, body in sections.items()},
    )


def items(section):
    """Return `(name, text)` of each item of a section such as `Args`."""
    texts = []
    for line in section.splitlines():
        if line.startswith(" ") and texts:
            texts[-1] += "\n" + line.strip()
        elif line.strip():
            texts.append(line)
    matches = [_ITEM.match(text) for text in texts]
    return [(match[1], " ".join(match[2].split("\n"))) for match in matches if match]


def markdown(doc):
    """Return the Markdown of a docstring, without a heading."""
    parts = [doc.summary]
    if doc.effects:
        parts.append(f"*Effects:* {doc.effects}")
    parts.append(doc.body)
    for name, text in doc.sections.items():
        title = _TITLES.get(name, name)
        if name == "Examples":
            parts.append(f"**{title}**\n\n```pycon\n{text.strip()}\n```")
        elif name in ("Returns", "Yields"):
            parts.append(f"**{title}:** {text.strip()}")
        else:
            rows = [f"- `{item}`: {description}" for item, description in items(text)]
            parts.append(f"**{title}**\n\n" + "\n".join(rows))
    return "\n\n".join(part for part in parts if part)
