"""Draws curves of the benchmarks from their result files, on logarithmic axes."""

import json
import math
import pathlib

from docs.svg import LINES, circle, document, line, polyline, text

RESULTS = pathlib.Path(__file__).parents[1] / "benchmarks" / "results"
LEFT, TOP, WIDTH, HEIGHT = 70, 46, 560, 260


def power(exponent):
    """Return a power of ten in digits, or with a superscript if that is longer."""
    if -3 <= exponent <= 3:
        return f"{10.0**exponent:g}"
    return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def axis_range(values):
    """Return the exponents of the powers of ten around values."""
    return math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))


def chart(title, curves, *, x_title, y_title):
    """Draw curves `{label: {x: y}}` with a grid of powers of ten; return the SVG."""
    x_low, x_high = axis_range([x for points in curves.values() for x in points])
    y_low, y_high = axis_range([y for points in curves.values() for y in points.values()])

    def at_x(value):
        return LEFT + WIDTH * (math.log10(value) - x_low) / (x_high - x_low)

    def at_y(value):
        return TOP + HEIGHT * (1 - (math.log10(value) - y_low) / (y_high - y_low))

    shapes = [text(0, 18, title, "title"), text(0, TOP - 12, y_title, "small")]
    for exponent in range(y_low, y_high + 1):
        y = at_y(10.0**exponent)
        shapes.append(line(LEFT, y, LEFT + WIDTH, y))
        shapes.append(text(LEFT - 8, y + 4, power(exponent), "small", "end"))
    for exponent in range(x_low, x_high + 1):
        x = at_x(10.0**exponent)
        shapes.append(text(x, TOP + HEIGHT + 18, power(exponent), "small", "middle"))
    shapes.append(text(LEFT + WIDTH / 2, TOP + HEIGHT + 38, x_title, "small", "middle"))
    legend_y = TOP + HEIGHT + 64
    for i, ((label, points), color) in enumerate(zip(curves.items(), LINES, strict=False)):
        places = [(at_x(x), at_y(y)) for x, y in points.items()]
        shapes.append(polyline(places, color))
        shapes += [circle(x, y, 3.5, color) for x, y in places]
        shapes.append(circle(LEFT + 140 * i, legend_y - 4, 5, color))
        shapes.append(text(LEFT + 140 * i + 12, legend_y, label))
    return document(title, LEFT + WIDTH + 20, legend_y + 12, shapes)


def order_sizes():
    """Draw the time to the first batch against the size of the dataset."""
    results = json.loads((RESULTS / "order_sizes.json").read_text())["results"]
    labels = {"torch": "PyTorch, from 0 %", "accelerate": "Accelerate", "faccel": "faccel"}
    curves = {
        labels[name]: {int(size): row["ms"]["median"] for size, row in results[name].items()}
        for name in ("faccel", "accelerate", "torch")
    }
    return chart(
        "The first shuffled batch at 50 % of an epoch",
        curves,
        x_title="samples of the dataset",
        y_title="ms of CPU time",
    )
