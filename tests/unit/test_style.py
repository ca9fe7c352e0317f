"""The limits of `benchmarks/style.py` hold for the package."""

import pytest

from benchmarks import style

FIGURES = style.measure("faccel", style.layers_of_faccel())


@pytest.mark.parametrize("name", style.LIMITS)
def test_the_package_stays_below_the_limit_of(name):
    assert FIGURES[name] <= style.LIMITS[name]


def test_comments_explain_the_code():
    assert FIGURES["comments"] >= style.MIN_COMMENTS


def test_each_measure_counts_known_code():
    text = "def f(each):  # why\n    return [x for x in each if x] if each else None\n"
    counts = style.count(text)
    assert counts["pronoun-like names"] == 1
    assert counts["conditional expressions"] == 1
    assert counts["comprehensions"] == 1
    assert (counts["lines"], counts["code lines"], counts["comments"]) == (2, 2, 1)


def test_a_cycle_and_an_upward_import_are_counted():
    graph = {"p.a": {"p.b"}, "p.b": {"p.a"}, "p.c": {"p.a"}}
    assert style.num_cycles(graph) == 2
    assert style.num_upward("p", graph, [["a"], ["b"], ["c"]]) == 2
