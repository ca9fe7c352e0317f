"""Checks the README and the pages under docs/: reference rows, links, lengths."""

import importlib
import inspect
import pkgutil
import re

import pytest

import faccel
from tests.docs.pages import README, ROOT, anchors, links, page_id, pages, prose, reference_rows

NAMESPACES = (
    "faccel",
    "faccel.backends",
    "faccel.checkpoint",
    "faccel.comm",
    "faccel.data",
    "faccel.func",
    "faccel.inference",
    "faccel.parallel",
    "faccel.random",
    "faccel.testing",
    "faccel.tracking",
    "faccel.tree",
)
ROWS = reference_rows()


def public_names():
    """Return every public name of faccel with its object."""
    names = {}
    for namespace in NAMESPACES:
        module = importlib.import_module(namespace)
        for name in module.__all__:
            names[f"{namespace}.{name}"] = getattr(module, name)
    for name, value in vars(faccel.errors).items():
        if inspect.isclass(value) and issubclass(value, faccel.errors.FaccelError):
            names[f"faccel.errors.{name}"] = value
    return names


def parameter_names(text):
    """Return the parameter names of a signature in a reference row."""
    without_defaults = re.sub(r"=[^,]*", "", text)
    words = [word.strip().lstrip("*") for word in without_defaults.split(",")]
    return [word for word in words if word]


def test_every_public_name_is_on_exactly_one_page():
    documented = sorted(row.name for row in ROWS)
    assert documented == sorted(public_names())


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_reference_row_has_the_parameters_of_the_function(row):
    value = public_names()[row.name]
    if row.parameters is None:
        assert not inspect.isfunction(value), "write the parameters of a function"
    else:
        assert parameter_names(row.parameters) == list(inspect.signature(value).parameters)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_description_is_a_sentence(row):
    assert row.description.endswith(".")
    assert len(row.description.split()) <= 30


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= 150


def test_the_index_links_every_page_and_the_readme_the_index():
    index = ROOT / "docs" / "index.md"
    linked = {(index.parent / target.partition("#")[0]).resolve() for target in links(index)}
    for path in pages():
        if path not in (README, index):
            assert path in linked, f"docs/index.md has no link to {page_id(path)}"
    assert "docs/index.md" in links(README)


@pytest.mark.parametrize("path", [*pages(), ROOT / "CONTRIBUTING.md"], ids=page_id)
def test_links_resolve(path):
    for target in links(path):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize("path", pages(), ids=page_id)
def test_names_of_faccel_on_a_page_exist(path):
    for code in re.findall(r"`([^`\n]+)`", prose(path)):
        for name in re.findall(r"(?<![\w./-])(faccel(?:\.\w+)+)", code):
            pkgutil.resolve_name(name)


@pytest.mark.parametrize("path", pages(), ids=page_id)
def test_files_that_a_page_names_exist(path):
    pattern = r"`((?:examples|benchmarks|tests)/[\w/]+(?:\.py|\.json)?)/?`"
    for name in re.findall(pattern, path.read_text()):
        assert (ROOT / name).exists(), name
