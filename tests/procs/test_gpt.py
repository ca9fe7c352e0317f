"""`examples/gpt.py` in real processes, over gloo."""

import pytest

import faccel
from tests.gpt_example import ALL_OPTIONS, train
from tests.ranks import run_ranks

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize(
    ("options", "mesh"),
    [
        ((), "dp_replicate=2"),
        (("--sequence-parallel",), "tp=2"),
        (("--tied", "--recompute"), "pp=2"),
        (ALL_OPTIONS, "pp=2,tp=2"),
    ],
)
def test_loss_and_norm_equal_one_process_over_gloo(options, mesh):
    size = faccel.MeshSpec.of(mesh).size
    for dtype, near in (("float64", 1e-10), ("float32", 1e-5)):
        words = ("--dtype", dtype, *options)
        (one,) = run_ranks(train, 1, *words, grad_accum=2)
        for result in run_ranks(train, size, *words, mesh=mesh, grad_accum=2):
            assert result == pytest.approx(one, abs=near)
