"""Draws the badges of the README from pyproject.toml: `python -m docs.badges`.

They are committed, and a test draws them again, so that a badge is never older than the project.
"""

import pathlib
import re
import tomllib

from docs.svg import badge

ROOT = pathlib.Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "badges"


def facts():
    """Return `{file name: (label, value)}`."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = settings["project"]
    pythons = re.findall(r"Python :: (3\.\d+)", "\n".join(project["classifiers"]))
    torch = next(name for name in project["dependencies"] if name.startswith("torch>="))
    # The newest heading has the date of a release, or "unreleased".
    changes = (ROOT / "CHANGELOG.md").read_text()
    date = re.search(rf"^## {re.escape(project['version'])} \((.*)\)$", changes, re.M)[1]
    return {
        "version": ("version", f"{project['version']}, {date}"),
        "python": ("Python", f"{pythons[0]} to {pythons[-1]}"),
        "torch": ("PyTorch", f"{torch.removeprefix('torch>=')} or newer"),
        "license": ("license", project["license"]),
        "typed": ("types", f"pyright {settings['tool']['pyright']['typeCheckingMode']}"),
    }


def draw():
    """Return `{file name: SVG}`."""
    return {name: badge(*fact) for name, fact in facts().items()}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, content in draw().items():
        (FOLDER / f"{name}.svg").write_text(content)
