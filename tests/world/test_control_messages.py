"""Ranks exchange failures as JSON: no class is looked up, as it is in a pickle."""

import sys

import pytest

import faccel
from faccel.comm.all_or_error import Failure, raise_on_all_ranks
from faccel.comm.objects import gather_json
from faccel.errors import ConfigError, FaccelError, RankFailedError
from faccel.testing import simulate

# Names in pickles that were read.
CLASSES = []


def record(event, args):
    if event == "pickle.find_class":
        CLASSES.append(args)


sys.addaudithook(record)


def in_main_first(ctx):
    with faccel.main_first(ctx):
        if ctx.is_main:
            raise ValueError("no \ud800 space")


def on_one_rank(ctx):
    error = None
    if ctx.rank == 1:
        error = ConfigError("`x` must be positive", got="-1", fix="write `x=1`")
    raise_on_all_ranks(error, ctx, "read `x`")


@pytest.mark.parametrize("fn", [in_main_first, on_one_rank])
def test_a_failure_is_exchanged_without_a_pickle(fn):
    def run(ctx):
        with pytest.raises((ValueError, FaccelError)):
            fn(ctx)

    CLASSES.clear()
    simulate(run, 3)
    assert CLASSES == []


def test_a_failure_arrives_with_its_message_and_fix():
    def report(ctx):
        try:
            on_one_rank(ctx)
        except RankFailedError as error:
            return error.problem, error.got, error.fix
        except ConfigError:
            return "own"

    expected = ("rank 1 could not read `x`", "`x` must be positive. -1", "write `x=1`")
    assert list(simulate(report, 2)) == [expected, "own"]


def test_objects_are_pickles():
    CLASSES.clear()
    simulate(lambda ctx: faccel.gather_objects(Failure(ctx.rank, "x"), ctx), 2)
    assert {name for _, name in CLASSES} == {"Failure"}


def test_values_arrive_unchanged():
    values = [None, True, 2**70, 0.1, "\u00e9\ud800", [1, [2]], {"a": None}, "x" * 5000]
    for result in simulate(lambda ctx: gather_json(values[ctx.rank], ctx), len(values)):
        assert result == values
