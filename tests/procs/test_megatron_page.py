"""The script of docs/megatron.md runs, with a small model on the CPU, and resumes."""

import math
import os
import re

import pytest

from faccel.backends.table import BACKENDS
from tests.docs.pages import ROOT
from tests.procs.test_megatron import on

REASON = BACKENDS["megatron"].probe(os.environ)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(REASON is not None, reason=f"Megatron-core cannot run here: {REASON}"),
]
PAGE = (ROOT / "docs" / "megatron.md").read_text()
(SCRIPT,) = re.findall(r"```text\n(import faccel\n.*?)```", PAGE, re.S)
INIT = re.compile(r"^ctx = faccel\.init\((.*)\)$", re.M)
SMALL = {
    "50304, 2048, 10_000": "64, 16, 10",
    "num_layers=24, hidden_size=1024, num_attention_heads=16,": "num_layers=2, hidden_size=32, "
    "num_attention_heads=4, use_cpu_initialization=True, gradient_accumulation_fusion=False, "
    "masked_softmax_fusion=False, bias_dropout_fusion=False, bias_activation_fusion=False, "
    "persist_layer_norm=False,",
    # Of TransformerEngine, which needs a GPU.
    "import get_gpt_layer_with_transformer_engine_spec": "import get_gpt_layer_local_spec",
    "get_gpt_layer_with_transformer_engine_spec()": "get_gpt_layer_local_spec("
    'normalization="LayerNorm")',
    "(64_000,": "(64,",
    "[:512]": "[:8]",
    "% 1000": "% 1",
    # `run_ranks` does both.
    "faccel.shutdown(ctx)": "",
}


def runs_the_page(ctx, folder):
    code = INIT.sub("", SCRIPT).replace('"runs"', repr(folder))
    for text, small in SMALL.items():
        assert code.count(text) == 1, text
        code = code.replace(text, small)
    names = {"ctx": ctx}
    exec(code, names)
    return names["step"], names["loss"].item(), names["schedule"].last_epoch


def test_the_script_of_the_page_trains_and_resumes(tmp_path):
    options = eval(f"dict({INIT.search(SCRIPT).group(1)})")
    results = on(4, runs_the_page, str(tmp_path), **options)
    # 16 batches of 4 rows on one data rank, 8 of them in an update.
    assert {step for step, *_ in results} == {2}
    assert results[0][1] == pytest.approx(math.log(64), rel=0.05)
    # Resumed after the last batch: nothing is left to train, so the loss is equal.
    assert on(4, runs_the_page, str(tmp_path), **options) == results
