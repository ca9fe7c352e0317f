"""Draws the shapes of the pictures, with colors that follow a light or a dark page."""

import html

# Eight colors that differ for people with color blindness, too, and are readable below dark text.
FILLS = ("#9ecae9", "#ffbf79", "#a5d79b", "#e6a3c4", "#c9b3e6", "#f2dc7d", "#8fd8cf", "#d0d0d0")
LINES = ("#2f8f4e", "#d9772b", "#3d83c9")  # readable on light and on dark paper
STYLE = """
svg.picture { color: #1f2733; --paper: #ffffff; --line: #9aa4b1; --soft: #5c6775; }
@media (prefers-color-scheme: dark) {
  svg.picture { color: #e6e9ee; --paper: #1e2129; --line: #6b7482; --soft: #a7b0bd; }
}
svg.picture text { font: 13px system-ui, sans-serif; fill: currentColor; }
svg.picture text.small { font-size: 11px; fill: var(--soft); }
svg.picture text.code { font-family: ui-monospace, monospace; font-size: 12px; }
svg.picture text.title { font-weight: 600; }
svg.picture text.in { fill: #1f2733; font-size: 12px; }
svg.picture .line { stroke: var(--line); fill: none; }
svg.picture .frame { stroke: var(--line); fill: none; }
"""


def rect(x, y, width, height, fill=None, *, dashed=False):
    """Return a rectangle; without a color it has a line only."""
    paint = 'class="frame"'
    if fill is not None:
        paint = f'fill="{fill}"'
    if dashed:
        paint += ' stroke-dasharray="4 3"'
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="3" {paint}/>'


def text(x, y, content, kind="", anchor="start"):
    """Return a line of text; `kind` is a class of the style."""
    escaped = html.escape(str(content))
    return f'<text x="{x:g}" y="{y:g}" class="{kind}" text-anchor="{anchor}">{escaped}</text>'


def box(x, y, width, height, content, fill):
    """Return a filled rectangle with text in its middle."""
    label = text(x + width / 2, y + height / 2 + 4, content, "in", "middle")
    return rect(x, y, width, height, fill) + label


def line(x1, y1, x2, y2):
    """Return a line."""
    return f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" class="line"/>'


def polyline(places, color):
    """Return a line through points `(x, y)`."""
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    return f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2.5"/>'


def circle(x, y, radius, color):
    """Return a filled circle."""
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" fill="{color}"/>'


def arrow(x1, y1, x2, y2):
    """Return a vertical or horizontal line with a head at its end."""
    if x1 == x2:
        head = f"M{x2 - 4:g},{y2 - 6:g} L{x2:g},{y2:g} L{x2 + 4:g},{y2 - 6:g}"
    else:
        head = f"M{x2 - 6:g},{y2 - 4:g} L{x2:g},{y2:g} L{x2 - 6:g},{y2 + 4:g}"
    return line(x1, y1, x2, y2) + f'<path d="{head}" class="line"/>'


def document(title, width, height, shapes):
    """Return a picture; its title is read by screen readers."""
    body = "\n".join(shapes)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="picture" role="img" '
        f'viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n{body}\n</svg>\n"
    )


def badge(label, value):
    """Return a label and a value side by side, on colors that fit a light and a dark page."""
    # A width for each character: no font can be measured here, and `textLength` fits the text.
    widths = [round(6.6 * len(word) + 12) for word in (label, value)]
    font = 'font-family="Verdana, DejaVu Sans, sans-serif" font-size="11"'
    shapes, x = [], 0
    for word, width, fill in zip((label, value), widths, ("#4b5563", "#2f6fb0"), strict=True):
        shapes.append(f'<rect x="{x}" width="{width}" height="20" fill="{fill}"/>')
        shapes.append(
            f'<text x="{x + 6}" y="14" textLength="{width - 12}" fill="#ffffff" '
            f"{font}>{html.escape(word)}</text>"
        )
        x += width
    body = "\n".join(shapes)
    title = html.escape(f"{label}: {value}")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" width="{x}" height="20">\n'
        f"<title>{title}</title>\n{body}\n</svg>\n"
    )
