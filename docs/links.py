"""Checks a built site: every link and anchor resolves, and nothing is loaded from another host."""

import html.parser
import posixpath
import re
import urllib.parse

import attrs

# Attributes whose address the browser loads with the page; a link of `<a>` is only followed.
_LOADED = {("img", "src"), ("script", "src"), ("source", "src"), ("iframe", "src")}
_STYLESHEET = ("stylesheet", "icon", "preload", "preconnect", "manifest")


@attrs.define
class Page:
    """The anchors and addresses of one page.

    Args:
        anchors: The `id` of every element.
        links: Addresses that a reader follows.
        resources: Addresses that the browser loads.
    """

    anchors: set[str] = attrs.field(factory=set)
    links: list[str] = attrs.field(factory=list)
    resources: list[str] = attrs.field(factory=list)


class _Reader(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.page = Page()

    def handle_starttag(self, tag, pairs):
        values = dict(pairs)
        if values.get("id"):
            self.page.anchors.add(values["id"])
        if tag == "a" and values.get("href"):
            self.page.links.append(values["href"])
        if tag == "link" and set(values.get("rel", "").split()) & set(_STYLESHEET):
            self.page.resources.append(values["href"])
        for name, value in pairs:
            if (tag, name) in _LOADED and value:
                self.page.resources.append(value)


def read(site):
    """Return the pages of a site by their path below it."""
    pages = {}
    for path in sorted(site.rglob("*.html")):
        reader = _Reader()
        reader.feed(path.read_text())
        pages[path.relative_to(site).as_posix()] = reader.page
    return pages


def problems(site):
    """Return one line for each broken link, missing anchor and resource of another host."""
    pages = read(site)
    lines = []
    for name, page in pages.items():
        if name == "404.html":  # its links are absolute, for the root of a host
            continue
        for target in page.links:
            lines += [f"{name}: {line}" for line in _link_problems(site, pages, name, target)]
        for target in page.resources:
            lines += [f"{name}: {line}" for line in _resource_problems(site, name, target)]
    return lines + _style_problems(site)


def _resource_problems(site, name, target):
    if urllib.parse.urlsplit(target).netloc:
        return [f"loads {target}"]
    if target.startswith("data:") or (site / _resolve(name, target)).exists():
        return []
    return [f"{target} is missing"]


def _style_problems(site):
    lines = []
    for path in site.rglob("*.css"):
        targets = re.findall(r"url\([\"']?(https?:[^)\"']*)", path.read_text())
        lines += [f"{path.relative_to(site)}: loads {target}" for target in targets]
    return lines


def _link_problems(site, pages, name, target):
    parts = urllib.parse.urlsplit(target)
    if parts.scheme or parts.netloc:
        return []
    path = _resolve(name, parts.path) if parts.path else name
    if (site / path).is_dir():
        path = posixpath.normpath(f"{path}/index.html")
    if not (site / path).exists():
        return [f"{target} is missing"]
    anchor = urllib.parse.unquote(parts.fragment)
    if anchor and path in pages and anchor not in pages[path].anchors:
        return [f"{target} has no such anchor"]
    return []


def _resolve(name, path):
    path = urllib.parse.unquote(path).partition("?")[0]
    return posixpath.normpath(posixpath.join(posixpath.dirname(name), path))
