"""Prepares the pages of docs/accelerate for the site: two columns, and the reason of each row.

In the Markdown a pair is two blocks, one after the other, and its reason is in the table of
features. The site has both in one place.
"""

import re

_PAIR = re.compile(
    r'(^```\w+ title="Accelerate"\n.*?^```\n)\n(^```\w+ title="faccel"\n.*?^```\n)', re.M | re.S
)
_ROW = re.compile(r"^\| \[([A-L]\d+)\]\(\S+\) \| .* \| ([a-z ]+) \| (.*) \|$", re.M)
_HEADING = re.compile(r"^### ([A-L]\d+) .*$\n", re.M)
_LINK = re.compile(r"\]\((?!\w+://)")


def arrange(folder):
    """Rewrite the pages below the folder `accelerate` of the sources of a site."""
    rows = reasons((folder / "accelerate-features.md").read_text())
    for path in (folder / "accelerate").glob("*.md"):
        text = _PAIR.sub(r'<div class="pair" markdown>\n\n\1\n\2\n</div>\n', path.read_text())
        path.write_text(_HEADING.sub(lambda match: match[0] + rows[match[1]], text))


def reasons(table):
    """Return a sentence with the state and the reason of each row that has a page."""
    sentences = {}
    for row, state, reason in _ROW.findall(table):
        sentences[row] = f"\n**{state}**: {_LINK.sub('](../', reason)}.\n"
    return sentences
