"""The reference that is generated for the site, its pictures, and the check of its links."""

import re

import attrs
import click
import pytest
from click.testing import CliRunner

from docs import build, docstrings, links, pictures, reference, side_by_side
from faccel.cli.commands import main
from faccel.config import config_fields
from faccel.errors import FaccelError
from tests.docs.pages import ROOT, prose
from tests.docs.test_pages import public_names

PAGES = reference.pages(build.guides())


def test_the_reference_has_every_public_name():
    assert sorted(reference.public_names()) == sorted(public_names())
    for name in public_names():
        page = PAGES[f"{name.rpartition('.')[0]}.md"]
        assert page.count(f"{{ #{name} }}") == 1


def test_every_argument_of_a_docstring_is_in_the_reference():
    for name, value in reference.public_names().items():
        for item, _ in docstrings.items(docstrings.read(value).sections.get("Args", "")):
            assert f"- `{item}`: " in PAGES[f"{name.rpartition('.')[0]}.md"], name


def test_every_error_has_its_entry_with_problems_and_fixes():
    page = PAGES["faccel.errors.md"]
    for error in [FaccelError, *FaccelError.__subclasses__()]:
        entry = page.partition(f"#faccel.errors.{error.__name__} }}")[2].partition("\n## ")[0]
        assert entry, error
        if error is not FaccelError:
            assert entry.count("\n| ") > 2, error  # a heading, a line, and problems


def test_every_option_of_every_command_is_listed():
    page = PAGES["command-line.md"]
    for name, command in reference.commands(main):
        section = page.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
        assert section, name
        for param in command.params:
            if isinstance(param, click.Option):
                assert all(f"`{option}`" in section for option in param.opts), (name, param.opts)


def test_every_field_of_the_configuration_and_of_a_plan_is_listed():
    page = PAGES["configuration.md"]
    for field in config_fields():
        assert f"| `{field.name}` |" in page
    for name, record in reference.plan_records():
        section = page.partition(f"### {name}\n")[2].partition("\n### ")[0]
        for field in attrs.fields(record):
            assert f"| `{field.name}` |" in section


def test_every_public_name_is_used_on_a_page_outside_of_its_reference_table():
    pages = [path for path in (ROOT / "docs").rglob("*.md") if path.name != "index.md"]
    rows = re.compile(r"^\| `faccel\.[\w.]+(?:\([^`]*\))?` \| .*$", re.M)
    text = "\n".join(rows.sub("", path.read_text()) for path in pages)
    words = set(re.findall(r"(?<=\.)\w+|\w+(?=\()|(?<=`)\w+(?=`)", text))
    words |= {name for line in re.findall(r"import (.*)", text) for name in line.split(", ")}
    missing = [name for name in public_names() if name.rpartition(".")[2] not in words]
    assert missing == []


def test_the_navigation_has_every_page_once():
    paths = [row[1] for rows in build.contents().values() for row in rows]
    expected = [
        path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")
    ]
    assert sorted([*paths, "index.md"]) == sorted(expected)


@pytest.mark.parametrize("name", pictures.PICTURES)
def test_a_picture_is_what_its_functions_draw(name):
    path = pictures.FOLDER / f"{name}.svg"
    assert path.read_text() == pictures.PICTURES[name](), "run `python -m docs.pictures`"


def test_every_picture_is_on_a_page():
    text = "\n".join(prose(path) for path in (ROOT / "docs").rglob("*.md"))
    files = {path.stem for path in pictures.FOLDER.glob("*.svg")}
    assert files == set(pictures.PICTURES)
    assert all(f"pictures/{name}.svg)" in text for name in files)


def test_the_batch_script_of_the_page_about_slurm_is_the_printed_one(tmp_path, monkeypatch):
    text = (ROOT / "docs" / "how-to" / "slurm.md").read_text()
    command = re.search(r"^faccel (launch --print slurm .*) > job.sh$", text, re.M)[1]
    shown = re.search(r"^```text\n(#!.*?)^```", text, re.M | re.S)[1].splitlines()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").touch()
    printed = CliRunner().invoke(main, command.split()).output
    assert shown == [line for line in printed.splitlines() if not line.startswith("# ")]


def site_with(tmp_path, body, head=""):
    page = tmp_path / "page" / "index.html"
    page.parent.mkdir()
    page.write_text(f"<html><head>{head}</head><body>{body}</body></html>")
    (tmp_path / "index.html").write_text('<h1 id="top">top</h1>')
    return links.problems(tmp_path)


def test_links_that_resolve_are_no_problem(tmp_path):
    body = '<a href="../#top">a</a> <a href="https://x.org">b</a> <a id="c" href="#c">c</a>'
    assert site_with(tmp_path, body) == []


@pytest.mark.parametrize(
    ("body", "head", "problem"),
    [
        ('<a href="../missing/">x</a>', "", "../missing/ is missing"),
        ('<a href="../#bottom">x</a>', "", "../#bottom has no such anchor"),
        ('<img src="../a.png">', "", "../a.png is missing"),
        ('<script src="https://x.org/a.js"></script>', "", "loads https://x.org/a.js"),
        ("", '<link rel="stylesheet" href="//x.org/a.css">', "loads //x.org/a.css"),
    ],
)
def test_a_broken_link_and_a_resource_of_another_host_are_found(tmp_path, body, head, problem):
    assert site_with(tmp_path, body, head) == [f"page/index.html: {problem}"]


def test_links_of_pages_become_links_of_the_site():
    text = "[a](../SECURITY.md#x) `faccel.gather(x, ctx)` `faccel.nothing`\n"
    text += "```\n`faccel.gather`\n```\n"
    assert build.converted(text, "launching.md") == (
        "[a](project/security.md#x) [`faccel.gather(x, ctx)`](reference/faccel.md#faccel.gather) "
        "`faccel.nothing`\n```\n`faccel.gather`\n```\n"
    )


def test_a_page_of_snippets_gets_two_columns_and_the_reasons(tmp_path):
    (tmp_path / "accelerate").mkdir()
    page = tmp_path / "accelerate" / "data.md"
    table = "| [B1](accelerate/data.md#b1) | `x` | not yet | [y](data.md#z), [w](https://w.org) |\n"
    (tmp_path / "accelerate-features.md").write_text(table)
    blocks = '```python title="Accelerate"\na\n```\n\n```sh title="faccel"\nb\n```\n'
    page.write_text(f"### B1 `x`\n\n{blocks}")
    side_by_side.arrange(tmp_path)
    sentence = "**not yet**: [y](../data.md#z), [w](https://w.org)."
    columns = f'<div class="pair" markdown>\n\n{blocks}\n</div>\n'
    assert page.read_text() == f"### B1 `x`\n\n{sentence}\n\n{columns}"
