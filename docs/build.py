"""Builds the site: `python -m docs.build` writes it to build/site.

The pages of this folder are copied to build/source, the pages of the reference are generated next
to them, and Zensical makes HTML. Any warning, broken link or missing anchor fails. Nothing is
loaded from the network.
"""

import argparse
import functools
import http.server
import os
import pathlib
import re
import shutil
import subprocess
import sys

from docs import links, pictures, reference, side_by_side, svg

DOCS = pathlib.Path(__file__).parent
ROOT = DOCS.parent
ADDED = {  # pages of other folders, and where the site has them
    "CONTRIBUTING.md": "project/contributing.md",
    "SECURITY.md": "project/security.md",
    "CHANGELOG.md": "project/changelog.md",
    "tests/README.md": "project/tests.md",
}
_LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")
_FENCE = re.compile(r"(^```.*?^```)", re.M | re.S)
_NAME = re.compile(r"(?<!\[)`(faccel(?:\.\w+)+)(\([^`]*\))?`")
_NOT_LINKED = re.compile(r"(^#.*$|\[[^\]]*\]\([^)]*\))", re.M)  # headings, and links
_SECTION = re.compile(r"^## (.*?)$(.*?)(?=^## |\Z)", re.M | re.S)
_ROW = re.compile(r"^\| \[([^\]]*)\]\(([^)#]+)\) \| (.*) \|$", re.M)


def guides():
    """Return `(title, path)` of the page whose reference table has a public name."""
    found = {}
    for path in sorted(DOCS.rglob("*.md")):
        text = path.read_text()
        title = text.partition("\n")[0].removeprefix("# ")
        for name in re.findall(r"^\| `(faccel\.[\w.]+)(?:\([^`]*\))?` \| ", text, re.M):
            found[name] = (title, path.relative_to(DOCS).as_posix())
    return found


def contents():
    """Return the sections of the index: `{section: [(title, path, description)]}`."""
    text = (DOCS / "index.md").read_text()
    sections = {title: _ROW.findall(body) for title, body in _SECTION.findall(text)}
    return {title: rows for title, rows in sections.items() if rows}


def generated_rows(pages):
    """Return the rows of the index for the pages of the reference."""
    rows = []
    for name, text in pages.items():
        title = text.partition("\n")[0].removeprefix("# ")
        namespace = name.removesuffix(".md")
        what = reference.TITLES.get(namespace, "public names")
        rows.append((title, f"reference/{name}", what[0].lower() + what[1:]))
    return rows


# --- sources


def write_sources(folder):
    """Write every page of the site as Markdown; return the navigation by section."""
    shutil.rmtree(folder, ignore_errors=True)
    ignore = shutil.ignore_patterns("*.py", "*.toml", "__pycache__")
    shutil.copytree(DOCS, folder, ignore=ignore)
    for source, target in ADDED.items():
        (folder / target).parent.mkdir(exist_ok=True)
        (folder / target).write_text((ROOT / source).read_text())
    pages = reference.pages(guides())
    (folder / "reference").mkdir(exist_ok=True)
    for name, text in pages.items():
        (folder / "reference" / name).write_text(text)
    navigation = contents()
    rows = generated_rows(pages)
    navigation["Reference"] = [*navigation.get("Reference", ()), *rows]
    _add_rows(folder / "index.md", "Reference", rows)
    for path in sorted(folder.rglob("*.md")):
        path.write_text(converted(path.read_text(), path.relative_to(folder).as_posix()))
    return navigation


def _add_rows(path, section, rows):
    lines = [f"| [{title}]({target}) | {what} |" for title, target, what in rows]
    begin, heading, rest = path.read_text().partition(f"## {section}\n")
    table, blank, end = rest.lstrip("\n").partition("\n\n")
    path.write_text(f"{begin}{heading}\n{table}\n" + "\n".join(lines) + f"{blank}{end}")


def converted(text, page):
    """Return the Markdown of a page with links of the site, and links to the reference."""
    origin = {target: source for source, target in ADDED.items()}.get(page, f"docs/{page}")
    parts = _FENCE.split(text)
    for i in range(0, len(parts), 2):
        parts[i] = _LINK.sub(lambda match: _site_link(match, origin, page), parts[i])
        if not page.startswith("reference/"):
            parts[i] = _linked_names(parts[i], page)
    return "".join(parts)


def _site_link(match, origin, page):
    target = match[2]
    if "://" in target or page.startswith("reference/") or target.startswith("reference/"):
        return match[0]
    path = os.path.normpath(os.path.join(os.path.dirname(origin), target))
    path = ADDED.get(path, path.removeprefix("docs/"))
    relative = os.path.relpath(path, os.path.dirname(page) or ".")
    return f"{match[1]}{relative}{match[3] or ''}{match[4]}"


def _linked_names(text, page):
    """Make public names in prose and tables links to their entries."""
    parts = _NOT_LINKED.split(text)
    for i in range(0, len(parts), 2):
        parts[i] = _NAME.sub(lambda match: _name_link(match, page), parts[i])
    return "".join(parts)


@functools.cache
def _public_names():
    return reference.public_names()


def _name_link(match, page):
    name = match[1]
    if name not in _public_names():
        return match[0]
    relative = os.path.relpath(reference.page_of(name), os.path.dirname(page) or ".")
    return f"[{match[0]}]({relative}#{name})"


# --- the site


def write_config(path, navigation):
    """Write the settings with the navigation."""
    entries = ['  {"faccel" = "index.md"},']
    for section, rows in navigation.items():
        pages = ", ".join(f'{{"{title}" = "{target}"}}' for title, target, _ in rows)
        entries.append(f'  {{"{section}" = [{pages}]}},')
    added = {"CONTRIBUTING.md": "Contributing", "SECURITY.md": "Security"}
    added |= {"tests/README.md": "Tests", "CHANGELOG.md": "Changes"}
    pages = ", ".join(f'{{"{title}" = "{ADDED[source]}"}}' for source, title in added.items())
    entries.append(f'  {{"Project" = [{pages}]}},')
    text = (DOCS / "zensical.toml").read_text()
    path.write_text(text.replace("nav = []", "nav = [\n" + "\n".join(entries) + "\n]"))


def add_markdown(source, site, navigation):
    """Add the Markdown of each page to the site, and llms.txt, which lists it."""
    for path in source.rglob("*.md"):
        target = site / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    lines = [
        "# faccel",
        "",
        "> Run your own PyTorch training loop on one process or on a thousand.",
    ]
    for section, rows in navigation.items():
        lines += ["", f"## {section}", ""]
        for title, target, what in rows:
            lines.append(f"- [{title}]({target}): {re.sub(r'[*`]', '', what)}")
    (site / "llms.txt").write_text("\n".join(lines) + "\n")


def inline_pictures(folder):
    """Replace images of the project's pictures by their SVG, which follows the site's colors."""
    pattern = re.compile(r"!\[([^\]]*)\]\(([\w./-]*pictures/([\w-]+)\.svg)\)")
    for path in folder.rglob("*.md"):
        text = path.read_text()
        if pattern.search(text):
            path.write_text(pattern.sub(lambda match: pictures.inline(match[3], match[1]), text))


def build(folder):
    """Build the site below a folder; return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    source, site = folder / "source", folder / "site"
    shutil.rmtree(site, ignore_errors=True)
    navigation = write_sources(source)
    texts = {path: path.read_text() for path in source.rglob("*.md")}
    inline_pictures(source)
    side_by_side.arrange(source)
    with (source / "assets" / "site.css").open("a") as style:
        style.write(svg.STYLE)
    write_config(folder / "zensical.toml", navigation)
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    output = result.stdout + result.stderr
    if result.returncode or "Warning" in output:
        sys.exit(output)
    for path, text in texts.items():  # with links to the pictures, and without elements of HTML
        path.write_text(text)
    add_markdown(source, site, navigation)
    lines = links.problems(site)
    if lines:
        sys.exit("\n".join(lines))
    return site


def main():
    """Build the site, and serve it with `--serve`."""
    parser = argparse.ArgumentParser(description="Build the site of the documentation.")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "build")
    parser.add_argument("--serve", type=int, metavar="PORT", help="serve it on 127.0.0.1")
    args = parser.parse_args()
    site = build(args.out.resolve())
    size = sum(path.stat().st_size for path in site.rglob("*") if path.is_file())
    num_pages = len(list(site.rglob("*.html")))
    print(f"{site}: {num_pages} pages, {size / 1e6:.1f} MB")
    if args.serve is not None:
        handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=site)
        http.server.ThreadingHTTPServer(("127.0.0.1", args.serve), handler).serve_forever()


if __name__ == "__main__":
    main()
