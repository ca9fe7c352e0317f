"""`examples/gpt.py` in real processes, over gloo."""

import json

import pytest

import faccel
from tests.forked_python import faccel_launch, forked_python
from tests.gpt_example import ALL_OPTIONS, train
from tests.procs.test_scripts import last_number, run
from tests.ranks import run_ranks

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize(
    ("options", "mesh"),
    [
        ((), "dp_replicate=2"),
        (("--sequence-parallel",), "tp=2"),
        (("--tied", "--activation-checkpoint"), "pp=2"),
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


MEGATRON = """\
distributed_type: MEGATRON_LM
num_processes: 2
megatron_lm_config:
  megatron_lm_tp_degree: 2
  megatron_lm_pp_degree: 1
  megatron_lm_num_micro_batches: 2
  megatron_lm_sequence_parallelism: true
  megatron_lm_use_distributed_optimizer: true
  megatron_lm_gradient_clipping: 1.0
  megatron_lm_new_key: 3
"""


def test_an_imported_file_starts_the_recipe_on_its_mesh(tmp_path):
    source, target = tmp_path / "megatron.yaml", tmp_path / "faccel.yaml"
    source.write_text(MEGATRON)
    faccel_ = [forked_python(), "-m", "faccel"]
    out = run("config", "import", str(source), "-o", str(target), "--json", launcher=faccel_)
    document = json.loads("\n".join(out))
    assert document["values"]["mesh"] == {"tp": 2, "dp_shard": -1}
    assert document["without_equivalent"] == {"megatron_lm_config.megatron_lm_new_key": 3}
    words = ("examples/gpt.py", "--steps", "3", "--sequence-parallel")
    expected = last_number(run(*words, FACCEL_GRAD_ACCUM="2"), "loss")
    lines = run(*words, launcher=faccel_launch(), FACCEL_CONFIG=str(target))
    assert lines[0].startswith("mesh ") and "tp=2" in lines[0]
    assert abs(last_number(lines, "loss") - expected) <= 1e-4
