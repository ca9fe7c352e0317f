"""Documents of other projects as YAML that people read and edit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml


class _Dumper(yaml.SafeDumper):
    """Writes scripts as blocks instead of as one quoted line, and repetitions in full."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = None
    # PyYAML quotes text that a block cannot have.
    if "\n" in text:
        style = "|"
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _represent_text)


def as_yaml(document: Mapping[str, Any], comment: str) -> str:
    """Return a document as YAML, after lines of comment.

    Effects: pure.

    Examples:
        >>> print(as_yaml({"name": "faccel", "run": "a\\nb\\n"}, "# Start: ..."), end="")
        # Start: ...
        name: faccel
        run: |
          a
          b
    """
    # In the order of the document, and long commands on one line
    text = yaml.dump(dict(document), Dumper=_Dumper, sort_keys=False, width=1000)
    return f"{comment}\n{text}"
