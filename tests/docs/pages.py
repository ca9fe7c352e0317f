"""Reads the README and the pages under docs/: their code blocks, tables, headings and links."""

import pathlib
import re

import attrs

ROOT = pathlib.Path(__file__).parents[2]
README = ROOT / "README.md"
FENCE = re.compile(r"^```.*?^```", re.M | re.S)


def pages():
    """Return the README and all pages, in a fixed order."""
    return [README, *sorted((ROOT / "docs").rglob("*.md"))]


def page_id(path):
    """Return the name of a page for pytest's ids."""
    return str(path.relative_to(ROOT))


def blocks(path, language):
    """Return the source of each fenced block of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.M | re.S)


def prose(path):
    """Return the text of a page without its code blocks."""
    return FENCE.sub("", path.read_text())


@attrs.frozen
class ReferenceRow:
    """One row of a reference table: a public name, its parameters and one sentence."""

    page: pathlib.Path
    name: str
    parameters: str | None
    description: str


REFERENCE_ROW = re.compile(
    r"^\| `(?P<name>faccel\.[\w.]+)(?:\((?P<parameters>[^`]*)\))?` \| (?P<description>.*) \|$", re.M
)


def reference_rows():
    """Return the rows of all reference tables, page by page."""
    rows = []
    for path in pages():
        for match in REFERENCE_ROW.finditer(prose(path)):
            rows.append(ReferenceRow(path, *match.group("name", "parameters", "description")))
    return rows


def anchors(path):
    """Return the anchors that GitHub makes from the headings of a page."""
    names = set()
    for heading in re.findall(r"^#+ (.*)$", prose(path), re.M):
        text = re.sub(r"[`*]", "", heading).strip().lower()
        names.add(re.sub(r"[^\w\- ]", "", text).replace(" ", "-"))
    return names


def links(path):
    """Return the targets of all links of a page."""
    return re.findall(r"\]\(([^)\s]+)\)", prose(path))


def generated_table(name):
    """Return the text between the markers of a generated table, which is on exactly one page."""
    pattern = re.compile(rf"<!-- {name} -->\n\n(.*?)\n\n<!-- end of {name} -->", re.S)
    tables = [match for path in pages() for match in pattern.findall(path.read_text())]
    assert len(tables) == 1, f"{len(tables)} pages have the table `{name}`"
    return tables[0]


def accuracy_in_readme():
    """Return the last line that the digits example prints, according to the README."""
    return re.search(r"accuracy \d\.\d{4}", README.read_text())[0]
