"""`main_first`, `on_rank` and `print` on several ranks."""

import attrs
import pytest
import torch

import faccel
from faccel.comm.all_or_error import all_or_error
from faccel.context import Topology
from faccel.errors import ConfigError, RankFailedError
from faccel.testing import fake_context, simulate


def test_main_runs_first_and_the_other_ranks_see_its_files(tmp_path):
    order = []

    def fn(ctx, local):
        with faccel.main_first(ctx, local=local):
            order.append(ctx.rank)
            if ctx.rank == 0:
                (tmp_path / "cache").touch()
            return (tmp_path / "cache").exists()

    assert simulate(fn, 3, True) == (True, True, True)
    order.clear()
    assert simulate(lambda ctx: fn(ctx, False), 3) == (True, True, True)
    assert order[0] == 0


def test_an_exception_on_main_reaches_the_waiting_ranks():
    seen = []

    def fn(ctx):
        try:
            with faccel.main_first(ctx):
                if ctx.is_main:
                    raise OSError("disk full")
                seen.append("body")
        except RankFailedError as error:
            seen.append((ctx.rank, error.got))
            raise

    with pytest.raises(OSError, match="disk full"):
        simulate(fn, 3)
    assert seen == [(1, "OSError: disk full"), (2, "OSError: disk full")]


def test_functions_run_on_one_rank_and_keep_their_names():
    def fn(ctx):
        @faccel.on_main(ctx)
        def main_only(x):
            """Return x."""
            return x

        assert (main_only.__name__, main_only.__doc__) == ("main_only", "Return x.")
        return main_only(7), faccel.on_rank(2, ctx)(lambda: "two")()

    assert simulate(fn, 3) == ((7, None), (None, None), (None, "two"))
    with pytest.raises(ConfigError):
        faccel.on_rank(3, fake_context(0, 3))


def test_a_function_runs_on_one_rank_of_each_node():
    # Ranks dealt over two nodes in turn, as `srun --distribution=cyclic` does.
    for rank, local_rank in enumerate((0, 0, 1, 1)):
        topology = Topology(rank=rank, world_size=4, local_rank=local_rank, local_world_size=2)
        ctx = attrs.evolve(fake_context(rank, 4), topology=topology)
        ran = faccel.comm.on_local_main(ctx)(lambda: "ran")()
        assert ran == (None if local_rank else "ran")


def test_print_writes_once():
    class Out:
        def __init__(self):
            self.writes = []

        def write(self, text):
            self.writes.append(text)

        def flush(self):
            pass

    out = Out()
    simulate(lambda ctx: faccel.print("a", ctx.rank, sep="-", end="!\n", file=out, ctx=ctx), 3)
    assert out.writes == ["a-0!\n"]


def test_a_failed_main_first_inside_all_or_error_ends_it_on_every_rank():
    def fn(ctx):
        def body():
            with faccel.main_first(ctx):
                if ctx.is_main:
                    raise OSError("no network")

        with pytest.raises(RankFailedError, match="no network"):
            all_or_error(body, ctx, "read the data")
        return int(faccel.reduce(torch.tensor(1), ctx))

    assert simulate(fn, 3) == (3, 3, 3)
