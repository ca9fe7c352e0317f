"""The desync law: ranks that disagree about equal shapes raise, and both call sites are named."""

import re

import pytest

from faccel.errors import DesyncError
from faccel.testing import simulate
from tests.desyncs import CASES, run


def assert_both_sites_are_named(got):
    assert re.search(r"rank 0: .* at tests/desyncs\.py:\d+", got), got
    assert re.search(r"rank 1: .* at tests/desyncs\.py:\d+", got), got
    # What each rank does differs, in words or by its line.
    first, _, second = got.partition(", rank 1: ")
    assert first.removeprefix("rank 0: ") != second


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_a_simulation_finds_each_disagreement_of_equal_shapes(case):
    with pytest.raises(DesyncError) as error:
        simulate(run, 2, case, mesh=CASES[case])
    assert_both_sites_are_named(error.value.got)
