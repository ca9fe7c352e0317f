"""The badges of the README."""

from docs import badges
from tests.docs.pages import README


def test_the_badges_show_what_pyproject_contains():
    files = {path.stem: path.read_text() for path in badges.FOLDER.glob("*.svg")}
    assert files == badges.draw(), "run `python -m docs.badges`"
    for name, (label, _) in badges.facts().items():
        assert f"![{label}](docs/badges/{name}.svg)" in README.read_text()
