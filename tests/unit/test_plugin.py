"""The pytest plugin, in a separate pytest process."""

import math
import subprocess
import sys

from faccel.testing.limits import LIMITS


def run_pytest(folder):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    return subprocess.run(
        [*command, str(folder)], capture_output=True, text=True, check=False, cwd=folder
    ).stdout


def test_a_marked_test_runs_in_each_world_and_a_wrong_mark_is_an_error(tmp_path):
    (tmp_path / "test_marked.py").write_text(
        "import pytest\n"
        "@pytest.mark.world_size(1, 2)\ndef test_a(ctx): assert ctx.world_size == 1\n"
    )
    out = run_pytest(tmp_path)
    assert "1 failed, 1 passed" in out
    assert "test_a[world2]" in out
    (tmp_path / "test_marked.py").unlink()
    wrong = {
        "no_ctx": "@pytest.mark.world_size(2)\ndef test_a(): pass\n",
        "no_size": "@pytest.mark.world_size()\ndef test_a(ctx): pass\n",
        "a_list": "@pytest.mark.world_size([1, 2])\ndef test_a(ctx): pass\n",
    }
    for name, source in wrong.items():
        (tmp_path / f"test_{name}.py").write_text("import pytest\n" + source)
    out = run_pytest(tmp_path)
    for name in wrong:
        assert f"test_{name}.py::test_a: `world_size` expects ints" in out
    assert "takes `ctx`" in out
    assert "passed" not in out


def test_the_suite_runs_without_a_wall_time_limit():
    assert LIMITS.timeout_s == math.inf
